// Package taillog keeps the open tail of a sequence on disk: the log from
// which a daemon that died takes up the tokens that were not sealed yet.
//
// A log is one file of records, each with its own checksum, seeded with the
// log's name. It is only ever appended to; sealing starts a new one. What
// lies behind the first record that does not check is not there: a torn
// write loses the step that was being written, never more.
package taillog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"kvtier/tiers"
)

// Kind is what a record holds; the caller gives it meaning.
type Kind uint8

const (
	recordMagic = 0x524c5654 // "TVLR"
	headerBytes = 4 + 1 + 3 + 8 + 4
	// maxRecord bounds a record's body: a bulk append of all layers.
	maxRecord = 1 << 31
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Log appends records to one file. Safe for concurrent use.
type Log struct {
	path string
	seed uint32
	mu   struct {
		sync.Mutex
		f       *os.File
		written int64 // bytes that write(2) took: they survive the process
		synced  int64 // bytes that fdatasync made safe from a power cut
	}
}

// Create makes a new log; it fails if the file exists.
func Create(path, name string) (*Log, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, wrap("create log", err)
	}
	return newLog(f, path, name, 0), nil
}

func newLog(f *os.File, path, name string, size int64) *Log {
	l := &Log{path: path, seed: crc32.Checksum([]byte(name), castagnoli)}
	l.mu.f, l.mu.written, l.mu.synced = f, size, size
	return l
}

// wrap marks a full disk.
func wrap(what string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%s: %w: %w", what, tiers.ErrFull, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Replay opens a log and hands every whole record to fn, in order. Bytes
// behind the last whole record are cut off; damaged says how many there were.
// An error of fn ends the replay and is returned.
func Replay(path, name string, fn func(k Kind, body []byte) error) (l *Log, damaged int64, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0o600)
	if err != nil {
		return nil, 0, wrap("open log", err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	st, err := f.Stat()
	if err != nil {
		return nil, 0, wrap("open log", err)
	}
	l = newLog(f, path, name, 0)
	good, err := l.scan(st.Size(), fn)
	if err != nil {
		return nil, 0, err
	}
	if damaged = st.Size() - good; damaged > 0 {
		if err := f.Truncate(good); err != nil {
			return nil, 0, wrap("cut log", err)
		}
	}
	if _, err := f.Seek(good, io.SeekStart); err != nil {
		return nil, 0, wrap("open log", err)
	}
	// A log that was read may still lie in the page cache alone.
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return nil, 0, wrap("sync log", err)
	}
	l.mu.written, l.mu.synced = good, good
	return l, damaged, nil
}

// scan reads whole records and returns where they end.
func (l *Log) scan(size int64, fn func(k Kind, body []byte) error) (good int64, err error) {
	var head [headerBytes]byte
	for {
		if _, err := l.mu.f.ReadAt(head[:], good); err != nil {
			return good, ignoreEOF(err)
		}
		kind, n, sum, ok := parseHeader(head[:])
		if !ok || n > uint64(size-good-headerBytes) {
			return good, nil
		}
		body := make([]byte, n)
		if _, err := l.mu.f.ReadAt(body, good+headerBytes); err != nil {
			return good, ignoreEOF(err)
		}
		if l.sum(head[:], body) != sum {
			return good, nil
		}
		if err := fn(kind, body); err != nil {
			return good, err
		}
		good += headerBytes + int64(n)
	}
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return wrap("read log", err)
}

func parseHeader(b []byte) (k Kind, n uint64, sum uint32, ok bool) {
	le := binary.LittleEndian
	n = le.Uint64(b[8:])
	return Kind(b[4]), n, le.Uint32(b[16:]), le.Uint32(b) == recordMagic && n <= maxRecord
}

func (l *Log) sum(head, body []byte) uint32 {
	return crc32.Update(crc32.Update(l.seed, castagnoli, head[:16]), castagnoli, body)
}

// Append writes one record whose body is the concatenation of parts. When it
// returns, the record survives the process (write(2) has taken it). If it
// fails, the log is as before.
func (l *Log) Append(k Kind, parts ...[]byte) error {
	buf := make([]byte, headerBytes)
	for _, p := range parts {
		buf = append(buf, p...)
	}
	body := buf[headerBytes:]
	if len(body) > maxRecord {
		return fmt.Errorf("append to log: record of %d bytes is too large", len(body))
	}
	le := binary.LittleEndian
	le.PutUint32(buf, recordMagic)
	buf[4] = byte(k)
	le.PutUint64(buf[8:], uint64(len(body)))
	le.PutUint32(buf[16:], l.sum(buf[:headerBytes], body))
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.f == nil {
		return fmt.Errorf("append to log: %w", tiers.ErrClosed)
	}
	if _, err := l.mu.f.WriteAt(buf, l.mu.written); err != nil {
		// Part of it may be there: cut it, so that a later record is not hidden behind it.
		_ = l.mu.f.Truncate(l.mu.written)
		return wrap("append to log", err)
	}
	l.mu.written += int64(len(buf))
	return nil
}

// Size returns the bytes written and the bytes that are safe from a power cut.
func (l *Log) Size() (written, synced int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.written, l.mu.synced
}

// Sync makes everything appended so far safe from a power cut.
func (l *Log) Sync() error {
	l.mu.Lock()
	f, written, synced := l.mu.f, l.mu.written, l.mu.synced
	l.mu.Unlock()
	if f == nil || written == synced {
		return nil
	}
	err := dataSync(f)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.f != f {
		return nil // closed meanwhile, which synced it, or removed
	}
	if err != nil {
		return wrap("sync log", err)
	}
	l.mu.synced = max(l.mu.synced, written)
	return nil
}

// dataSync holds on to the file's descriptor: the file may be closed meanwhile,
// and its number be another file's.
func dataSync(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if e := raw.Control(func(fd uintptr) { err = unix.Fdatasync(int(fd)) }); e != nil {
		return e
	}
	return err
}

// Close syncs and closes the file.
func (l *Log) Close() error {
	err := l.Sync()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.f == nil {
		return nil
	}
	err = errors.Join(err, l.mu.f.Close())
	l.mu.f = nil
	return err
}

// Remove closes the log and deletes its file.
func (l *Log) Remove() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.f != nil {
		l.mu.f.Close()
		l.mu.f = nil
	}
	return os.Remove(l.path)
}
