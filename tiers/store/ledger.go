package store

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"sync"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"kvtier/tiers"
	"kvtier/tiers/files"
)

// ledger notices records that vanished. Pebble checks what it reads, but a
// damaged end of its write-ahead log or manifest is to it an end: what came
// after is gone without an error. So every change also writes a digest of all
// records that are there then, as a record; and when the change is committed,
// its number goes to a file beside the catalogue. At the next start the records
// must have the digest, and it must not be older than the file. The file is
// not synced: after a power cut it may be behind, and the loss of changes that it
// does not know of goes unnoticed.
type ledger struct {
	mu struct {
		sync.Mutex
		file    files.File
		digest  digest
		records map[string]uint64 // sums, by key
	}
}

// digest of the catalogue after so many changes.
type digest struct {
	changes, records uint64
	sum              uint64 // of all records' sums, exclusive or
}

const (
	kindDigest  Kind = 'd'
	changesFile      = "CHANGES"
)

func recordSum(key, value []byte) uint64 {
	h := sha256.New()
	h.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(key))))
	h.Write(key)
	h.Write(value)
	return binary.LittleEndian.Uint64(h.Sum(nil))
}

func (d digest) marshal() []byte {
	b := binary.LittleEndian.AppendUint64(nil, d.changes)
	b = binary.LittleEndian.AppendUint64(b, d.records)
	return binary.LittleEndian.AppendUint64(b, d.sum)
}

func newLedger() *ledger {
	l := &ledger{}
	l.mu.records = map[string]uint64{}
	return l
}

// openLedger compares the catalogue with its digest and with the file. It
// changes nothing in the catalogue.
func openLedger(fsys files.FS, catalogue vfs.FS, dir string, log *slog.Logger) (*ledger, error) {
	l := newLedger()
	found, err := l.loadFrom(catalogue, filepath.Join(dir, catalogueDir), log)
	if err != nil {
		return nil, err
	}
	if err := l.compare(found); err != nil {
		return nil, err
	}
	l.mu.digest.changes = found.changes
	path := filepath.Join(dir, changesFile)
	if l.mu.file, err = fsys.Open(path, 0); errors.Is(err, fs.ErrNotExist) {
		l.mu.file, err = fsys.Open(path, files.Create)
	}
	if err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	changes, ok := readChanges(l.mu.file)
	switch {
	case changes > found.changes:
		return nil, errors.Join(lostChanges(changes, found), l.close())
	case !ok && found.changes > 0:
		log.Warn("the number of changes to the catalogue cannot be read; it is written anew", "file", path)
	}
	if err := l.writeFile(); err != nil {
		return nil, errors.Join(fmt.Errorf("data folder: %w", err), l.close())
	}
	return l, nil
}

// loadFrom loads a catalogue, if there is one.
func (l *ledger) loadFrom(fsys vfs.FS, dir string, log *slog.Logger) (found digest, err error) {
	db, err := openExisting(fsys, dir, log)
	if err != nil || db == nil {
		return found, err
	}
	found, err = l.load(db)
	return found, errors.Join(err, db.Close())
}

// openExisting opens a catalogue for reading; nil if there is none.
func openExisting(fsys vfs.FS, dir string, log *slog.Logger) (*pebble.DB, error) {
	there, err := pebble.Peek(dir, fsys)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !there.Exists {
		return nil, nil
	}
	if err != nil {
		return nil, catalogueError("look for the catalogue", err)
	}
	return openCatalogue(fsys, dir, true, log)
}

// compare says whether the records that were loaded have the digest that was found.
func (l *ledger) compare(found digest) error {
	if have := l.mu.digest; found.records != have.records || found.sum != have.sum {
		return fmt.Errorf("the catalogue lost records or has some too many, %d where %d should be: %w; %s",
			have.records, found.records, tiers.ErrCorrupt, whatToDo)
	}
	return nil
}

func lostChanges(changes uint64, found digest) error {
	return fmt.Errorf("the catalogue lost its last %d changes: %w; %s", changes-found.changes, tiers.ErrCorrupt, whatToDo)
}

// load sums up the records and returns the digest that is stored.
func (l *ledger) load(db *pebble.DB) (found digest, err error) {
	it, err := db.NewIter(nil)
	if err != nil {
		return found, catalogueError("read the catalogue", err)
	}
	defer it.Close()
	for it.First(); it.Valid(); it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			return found, catalogueError("read the catalogue", err)
		}
		if Kind(it.Key()[0]) != kindDigest {
			l.noteLocked(it.Key(), recordSum(it.Key(), v))
			continue
		}
		if v, err = openValue(it.Key(), v); err != nil {
			return found, err
		}
		if len(v) != 24 {
			return found, fmt.Errorf("catalogue: digest of %d bytes: %w", len(v), tiers.ErrCorrupt)
		}
		le := binary.LittleEndian
		found = digest{le.Uint64(v), le.Uint64(v[8:]), le.Uint64(v[16:])}
	}
	return found, catalogueError("read the catalogue", it.Error())
}

// noteLocked takes in a record; sum 0 removes it.
func (l *ledger) noteLocked(key []byte, sum uint64) {
	d := &l.mu.digest
	if old, ok := l.mu.records[string(key)]; ok {
		d.sum ^= old
		d.records--
		delete(l.mu.records, string(key))
	}
	if sum != 0 {
		d.sum ^= sum
		d.records++
		l.mu.records[string(key)] = sum
	}
}

// commit commits b with the digest that the catalogue then has.
func (l *ledger) commit(b *pebble.Batch) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.file == nil {
		return fmt.Errorf("commit to the catalogue: %w", tiers.ErrClosed)
	}
	before, undo := l.mu.digest, map[string]uint64{}
	for r := b.Reader(); ; {
		kind, key, value, ok, err := r.Next()
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		if _, seen := undo[string(key)]; !seen {
			undo[string(key)] = l.mu.records[string(key)]
		}
		sum := uint64(0)
		if kind == pebble.InternalKeyKindSet {
			sum = recordSum(key, value)
		}
		l.noteLocked(key, sum)
	}
	l.mu.digest.changes++
	key := []byte{byte(kindDigest)}
	err := b.Set(key, sealValue(key, l.mu.digest.marshal()), nil)
	if err == nil {
		err = commitOrEnd(b)
	}
	if err != nil {
		for k, sum := range undo {
			l.noteLocked([]byte(k), sum)
		}
		l.mu.digest = before
		return err
	}
	_ = l.writeFile() // the change stands; the file may be behind
	return nil
}

// commitOrEnd commits b, or ends the process: Pebble panics where it cannot write, and then nobody knows whether the change stands. So nothing may go on
// by what it knows of it; what is on disk is found out at the next start. The panic is raised where nobody recovers it, as front ends do.
func commitOrEnd(b *pebble.Batch) error {
	defer func() {
		if why := recover(); why != nil {
			go panic(why)
			select {}
		}
	}()
	return b.Commit(pebble.Sync)
}

// readChanges returns the number of changes in the file. Without it a loss goes
// unnoticed: so it is read twice, lest it went wrong on the way only.
func readChanges(f io.ReaderAt) (changes uint64, ok bool) {
	for range 2 {
		var b [12]byte
		if n, _ := f.ReadAt(b[:], 0); n == len(b) && crc32.Checksum(b[:8], castagnoli) == binary.LittleEndian.Uint32(b[8:]) {
			return binary.LittleEndian.Uint64(b[:]), true
		}
	}
	return 0, false
}

func (l *ledger) writeFile() error {
	b := binary.LittleEndian.AppendUint64(nil, l.mu.digest.changes)
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	_, err := l.mu.file.WriteAt(b, 0)
	return err
}

// close lets later commits fail.
func (l *ledger) close() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.file == nil {
		return nil
	}
	err := l.mu.file.Close()
	l.mu.file = nil
	return err
}
