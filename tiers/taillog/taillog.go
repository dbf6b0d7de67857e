// Package taillog keeps the open tail of a sequence on disk: the log from
// which a daemon that died takes up the tokens that were not sealed yet.
//
// A log is one file of records, each with its own checksum, seeded with the
// log's name, and a number. It is only ever appended to; sealing starts a new
// one. What lies behind the first record that does not check is not there: a
// torn write loses the step that was being written, never more. Whole records
// behind it say that the log was damaged later; the caller is shown them,
// because they may take back what lies before.
package taillog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"kvtier/tiers"
)

// Kind is what a record holds; the caller gives it meaning.
type Kind uint8

const (
	recordMagic = 0x524c5654 // "TVLR"
	headerBytes = 4 + 1 + 3 + 8 + 4
	numbers     = 1 << 24 // records are numbered modulo this
	// maxRecord bounds a record's body: a bulk append of all layers.
	maxRecord = 1 << 31
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Log appends records to one file. Safe for concurrent use.
type Log struct {
	path string
	seed uint32
	room *[]byte // bodies are read into it, each over the last; nil: each into its own
	mu   struct {
		sync.Mutex
		f       *os.File
		next    uint32 // number of the next record
		written int64  // bytes that write(2) took: they survive the process
		synced  int64  // bytes that fdatasync made safe from a power cut
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

// Reader takes in what a log holds. A body is valid until the function returns.
type Reader struct {
	// Record gets every whole record, in order, up to the first that is not. Its
	// error ends the replay and is returned.
	Record func(k Kind, body []byte) error
	// Behind gets whole records that lie behind a damaged one. They are cut off
	// with it. lost is how many records are missing before this one.
	Behind func(lost int, k Kind, body []byte)
}

// Replay opens a log and hands out its records. Bytes behind the last whole
// record are cut off; damaged says how many there were.
func Replay(path, name string, r Reader) (l *Log, damaged int64, err error) {
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
	l.room = &[]byte{}
	defer func(l *Log) { l.room = nil }(l)
	good, err := l.scan(st.Size(), r.Record)
	if err == nil && good < st.Size() && r.Behind != nil {
		err = l.scanBehind(good, st.Size(), r.Behind)
	}
	if err != nil {
		return nil, 0, err
	}
	if damaged = st.Size() - good; damaged > 0 {
		if err := f.Truncate(good); err != nil {
			return nil, 0, wrap("cut log", err)
		}
	}
	// A log that was read may still lie in the page cache alone.
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return nil, 0, wrap("sync log", err)
	}
	l.mu.written, l.mu.synced = good, good
	return l, damaged, nil
}

// Read hands out every record appended so far, in order; a body is valid until
// fn returns. A record that is not
// whole any more is tiers.ErrCorrupt; an error of fn ends the reading and is
// returned.
func (l *Log) Read(fn func(k Kind, body []byte) error) error {
	r := &Log{seed: l.seed, room: &[]byte{}} // a place of its own in the file
	l.mu.Lock()
	f, size := l.mu.f, l.mu.written
	l.mu.Unlock()
	if f == nil {
		return fmt.Errorf("read log: %w", tiers.ErrClosed)
	}
	r.mu.f = f
	good, err := r.scan(size, fn)
	if err == nil && good < size {
		err = fmt.Errorf("read log: the record at byte %d of %d is damaged: %w", good, size, tiers.ErrCorrupt)
	}
	return err
}

// scan reads whole records and returns where they end.
func (l *Log) scan(size int64, fn func(k Kind, body []byte) error) (good int64, err error) {
	for {
		h, body, err := l.record(good, size)
		if err != nil || body == nil || h.number != l.mu.next {
			return good, err
		}
		if err := fn(h.kind, body); err != nil {
			return good, err
		}
		l.mu.next = (h.number + 1) % numbers
		good += headerBytes + int64(h.n)
	}
}

// scanBehind finds whole records behind offset good, where one is damaged.
func (l *Log) scanBehind(good, size int64, fn func(lost int, k Kind, body []byte)) error {
	const step = 1 << 20
	magic := binary.LittleEndian.AppendUint32(nil, recordMagic)
	buf := make([]byte, step)
	next := l.mu.next
	for at := good + 1; at+headerBytes <= size; {
		n, err := l.mu.f.ReadAt(buf, at)
		if err := ignoreEOF(err); err != nil {
			return err
		}
		i := bytes.Index(buf[:n], magic)
		if i < 0 {
			at += max(int64(n)-3, 1) // the magic may straddle
			continue
		}
		at += int64(i)
		h, body, err := l.record(at, size)
		if err != nil {
			return err
		}
		if body == nil {
			at++
			continue
		}
		fn(int((h.number+numbers-next)%numbers), h.kind, body)
		next = (h.number + 1) % numbers
		at += headerBytes + int64(h.n)
	}
	return nil
}

// record reads the record at an offset; body is nil if there is no whole one.
func (l *Log) record(at, size int64) (h header, body []byte, err error) {
	var head [headerBytes]byte
	if _, err := l.mu.f.ReadAt(head[:], at); err != nil {
		return h, nil, ignoreEOF(err)
	}
	h, ok := parseHeader(head[:])
	if !ok || h.n > uint64(size-at-headerBytes) {
		return h, nil, nil
	}
	if l.room == nil {
		body = make([]byte, h.n)
	} else {
		*l.room = slices.Grow((*l.room)[:0], int(h.n))
		body = (*l.room)[:h.n]
	}
	if _, err := l.mu.f.ReadAt(body, at+headerBytes); err != nil {
		return h, nil, ignoreEOF(err)
	}
	if l.sum(head[:], body) != h.sum {
		return h, nil, nil
	}
	return h, body, nil
}

func ignoreEOF(err error) error {
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return wrap("read log", err)
}

// header of a record: magic, kind, number, length of the body, checksum.
type header struct {
	kind   Kind
	number uint32
	n      uint64
	sum    uint32
}

func parseHeader(b []byte) (h header, ok bool) {
	le := binary.LittleEndian
	h = header{Kind(b[4]), le.Uint32(b[4:]) >> 8, le.Uint64(b[8:]), le.Uint32(b[16:])}
	return h, le.Uint32(b) == recordMagic && h.n <= maxRecord
}

func (l *Log) sum(head, body []byte) uint32 {
	return crc32.Update(crc32.Update(l.seed, castagnoli, head[:16]), castagnoli, body)
}

// Append writes one record whose body is the concatenation of parts. When it
// returns, the record survives the process (write(2) has taken it). If it
// fails, the log is as before.
func (l *Log) Append(k Kind, parts ...[]byte) error { return l.append(1, k, parts) }

// AppendTwice writes a record twice, in one write: one damaged place does not
// lose it.
func (l *Log) AppendTwice(k Kind, parts ...[]byte) error { return l.append(2, k, parts) }

func (l *Log) append(copies uint32, k Kind, parts [][]byte) error {
	size := headerBytes
	for _, p := range parts {
		size += len(p)
	}
	rec := make([]byte, headerBytes, size)
	for _, p := range parts {
		rec = append(rec, p...)
	}
	body := rec[headerBytes:]
	if len(body) > maxRecord {
		return fmt.Errorf("append to log: record of %d bytes is too large", len(body))
	}
	le := binary.LittleEndian
	le.PutUint32(rec, recordMagic)
	le.PutUint64(rec[8:], uint64(len(body)))
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.f == nil {
		return fmt.Errorf("append to log: %w", tiers.ErrClosed)
	}
	buf := rec
	for i := range copies {
		le.PutUint32(rec[4:], uint32(k)|(l.mu.next+i)%numbers<<8)
		le.PutUint32(rec[16:], l.sum(rec[:headerBytes], body))
		if i > 0 {
			buf = append(buf, rec...)
		} else if copies > 1 {
			buf = bytes.Clone(rec)
		}
	}
	if _, err := l.mu.f.WriteAt(buf, l.mu.written); err != nil {
		// Part of it may be there: cut it, so that a later record is not hidden behind it.
		_ = l.mu.f.Truncate(l.mu.written)
		return wrap("append to log", err)
	}
	l.mu.next = (l.mu.next + copies) % numbers
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
