// Package taillog keeps the open tail of a sequence on disk: the log from
// which a daemon that died takes up the tokens that were not sealed yet.
//
// A log is one file of records, each with its own checksum, seeded with the
// log's name, and a number. It is only ever appended to; sealing starts a new
// one. What lies behind the first record that does not check is not there: a
// torn write loses the step that was being written, never more. A power cut may
// lose any part of what was not synced, and leave whole records behind it. So a
// record says how much was synced when it was written: where that was more, the
// log was damaged later. The caller is shown whole records behind a lost one
// either way, because those lost may have taken back what lies before.
package taillog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"slices"
	"sync"
	"syscall"

	"kvtier/tiers"
	"kvtier/tiers/files"
)

// Kind is what a record holds; the caller gives it meaning.
type Kind uint8

const (
	recordMagic = 0x524c5654 // "TVLR"
	headerBytes = 4 + 1 + 3 + 8 + 8 + 8 + 4
	numbers     = 1 << 24 // records are numbered modulo this
	// KeepsAll is what a record keeps that takes nothing back.
	KeepsAll = math.MaxUint64
	// maxRecord bounds a record's body: a bulk append of all layers.
	maxRecord = 1 << 31
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Log appends records to one file. Safe for concurrent use.
type Log struct {
	fs   files.FS
	path string
	seed uint32
	room *[]byte // bodies are read into it, each over the last; nil: each into its own

	// syncing serialises Sync and Close: of two syncs at once the system tells only
	// one that it gave bytes up. It is held during an fsync, and taken before mu,
	// which is not: nothing else waits for a sync.
	syncing sync.Mutex

	mu struct {
		sync.Mutex
		f       files.File
		next    uint32 // number of the next record
		written int64  // bytes that write(2) took: they survive the process
		synced  int64  // bytes that fdatasync made safe from a power cut
		taking  []take // records that take something back, and are not synced
		failed  error  // why nobody knows what the file holds; nil if somebody does
		using   bool   // an fsync is under way
	}
}

// take is a record that ends at some byte and keeps so much of what lies before.
type take struct {
	end   int64
	keeps uint64
}

// Create makes a new log; it fails if the file exists. Its name in the folder
// is durable once the caller has synced that.
func Create(fsys files.FS, path, name string) (*Log, error) {
	f, err := fsys.Open(path, files.Create)
	if err != nil {
		return nil, wrap("create log", err)
	}
	return newLog(f, fsys, path, name, 0), nil
}

func newLog(f files.File, fsys files.FS, path, name string, size int64) *Log {
	l := &Log{fs: fsys, path: path, seed: crc32.Checksum([]byte(name), castagnoli)}
	l.mu.f, l.mu.written, l.mu.synced = f, size, size
	return l
}

// wrap marks a full disk.
func wrap(what string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%s: %w: %w", what, tiers.ErrFull, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Reader takes in what a log holds. A body is valid until the function returns.
type Reader struct {
	// Record gets every whole record, in order, up to the first that is not. Its
	// error ends the replay and is returned.
	Record func(k Kind, body []byte) error
	// Behind gets whole records that lie behind a lost one. They are cut off with it.
	Behind func(b Behind)
}

// Behind is a whole record behind one that was lost.
type Behind struct {
	Kind Kind
	Body []byte // valid until Behind returns
	Lost int    // records that are missing before this one
	// Durable says that what was lost was synced when this record was written: no
	// power cut explains it.
	Durable bool
	// Keeps is, unless Durable, the least that this record and those lost keep of
	// what was logged before them, in the caller's measure; KeepsAll if they take
	// nothing back.
	Keeps uint64
}

// Replay opens a log and hands out its records. Bytes behind the last whole
// record are cut off; damaged says how many there were.
func Replay(fsys files.FS, path, name string, r Reader) (l *Log, damaged int64, err error) {
	l, good, size, err := openAndScan(fsys, path, name, 0, r)
	if err != nil {
		return nil, 0, err
	}
	defer func(f files.File) {
		if err != nil {
			f.Close()
		}
	}(l.mu.f)
	if damaged = size - good; damaged > 0 {
		if err := l.mu.f.Truncate(good); err != nil {
			return nil, 0, wrap("cut log", err)
		}
	}
	// A log that was read may still lie in the page cache alone.
	if err := l.mu.f.Sync(); err != nil {
		return nil, 0, wrap("sync log", err)
	}
	l.mu.written, l.mu.synced = good, good
	return l, damaged, nil
}

// Scan hands out the records of a log as Replay does, and changes nothing: good
// is where the last whole record ends, of size bytes. If r.Record fails, good is
// where the record begins that it was given.
func Scan(fsys files.FS, path, name string, r Reader) (good, size int64, err error) {
	l, good, size, err := openAndScan(fsys, path, name, files.Read, r)
	if l != nil {
		err = errors.Join(err, l.mu.f.Close())
	}
	return good, size, err
}

// openAndScan opens a log and reads it; the log is nil if there is an error.
func openAndScan(fsys files.FS, path, name string, how files.Flag, r Reader) (l *Log, good, size int64, err error) {
	f, err := fsys.Open(path, how)
	if err != nil {
		return nil, 0, 0, wrap("open log", err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if size, err = f.Size(); err != nil {
		return nil, 0, 0, wrap("open log", err)
	}
	log := newLog(f, fsys, path, name, 0)
	log.room = &[]byte{}
	defer func() { log.room = nil }()
	good, err = log.scan(size, r.Record)
	if err == nil && good < size && r.Behind != nil {
		err = log.scanBehind(good, size, r.Behind)
	}
	if err != nil {
		return nil, good, size, err
	}
	return log, good, size, nil
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
func (l *Log) scanBehind(good, size int64, fn func(Behind)) error {
	const step = 1 << 20
	magic := binary.LittleEndian.AppendUint32(nil, recordMagic)
	buf := make([]byte, step)
	next := l.mu.next
	for at := good + 1; at+headerBytes <= size; {
		buf = buf[:min(step, size-at)]
		if err := l.read(buf, at); err != nil {
			return err
		}
		i := bytes.Index(buf, magic)
		if i < 0 {
			at += max(int64(len(buf))-3, 1) // the magic may straddle
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
		fn(Behind{Kind: h.kind, Body: body, Lost: int((h.number + numbers - next) % numbers), Durable: uint64(good) < h.synced, Keeps: h.keeps})
		next = (h.number + 1) % numbers
		at += headerBytes + int64(h.n)
	}
	return nil
}

// record reads the record at an offset; body is nil if there is no whole one.
// That is then cut off: so it is read twice, lest it went wrong on the way only.
func (l *Log) record(at, size int64) (h header, body []byte, err error) {
	for range 2 {
		if h, body, err = l.recordOnce(at, size); body != nil || err != nil {
			break
		}
	}
	return h, body, err
}

func (l *Log) recordOnce(at, size int64) (h header, body []byte, err error) {
	var head [headerBytes]byte
	if size-at < headerBytes {
		return h, nil, nil
	}
	if err := l.read(head[:], at); err != nil {
		return h, nil, err
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
	if err := l.read(body, at+headerBytes); err != nil {
		return h, nil, err
	}
	if l.sum(head[:], body) != h.sum {
		return h, nil, nil
	}
	return h, body, nil
}

// read reads bytes that the file has.
func (l *Log) read(b []byte, at int64) error {
	n, err := l.mu.f.ReadAt(b, at)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return wrap("read log", err)
}

// header of a record: magic, kind, number, length of the body, bytes of the log
// that were synced when it was written, the least that records keep from there
// on, checksum.
type header struct {
	kind   Kind
	number uint32
	n      uint64
	synced uint64
	keeps  uint64
	sum    uint32
}

func parseHeader(b []byte) (h header, ok bool) {
	le := binary.LittleEndian
	h = header{Kind(b[4]), le.Uint32(b[4:]) >> 8, le.Uint64(b[8:]), le.Uint64(b[16:]), le.Uint64(b[24:]), le.Uint32(b[32:])}
	return h, le.Uint32(b) == recordMagic && h.n <= maxRecord
}

func (l *Log) sum(head []byte, body ...[]byte) uint32 {
	sum := crc32.Update(l.seed, castagnoli, head[:headerBytes-4])
	for _, b := range body {
		sum = crc32.Update(sum, castagnoli, b)
	}
	return sum
}

// Append writes one record whose body is the concatenation of parts. When it
// returns, the record survives the process (write(2) has taken it). If it
// fails, the log is as before.
func (l *Log) Append(k Kind, parts ...[]byte) error { return l.append(1, k, KeepsAll, parts) }

// TakeBack writes a record that keeps so much of what was logged before, in the
// caller's measure. It is written twice, in one write: one damaged place does
// not lose it.
func (l *Log) TakeBack(k Kind, keeps uint64, parts ...[]byte) error {
	return l.append(2, k, keeps, parts)
}

// writer gathers small parts of a record into one write; large ones, a prefill's rows, are written as they lie.
type writer struct {
	f   files.File
	at  int64
	buf []byte
	err error // of the first write that failed
}

const (
	gatherBytes = 1 << 20
	largePart   = 64 << 10
)

func (w *writer) add(b []byte) {
	if len(b) >= largePart {
		w.flush()
		w.write(b)
		return
	}
	if len(w.buf)+len(b) > gatherBytes {
		w.flush()
	}
	w.buf = append(w.buf, b...)
}

func (w *writer) flush() {
	w.write(w.buf)
	w.buf = w.buf[:0]
}

func (w *writer) write(b []byte) {
	if w.err != nil || len(b) == 0 {
		return
	}
	n, err := w.f.WriteAt(b, w.at)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	w.at, w.err = w.at+int64(n), err
}

func (l *Log) append(copies uint32, k Kind, keeps uint64, parts [][]byte) error {
	size := 0
	for _, p := range parts {
		size += len(p)
	}
	if size > maxRecord {
		return fmt.Errorf("append to log: record of %d bytes is too large", size)
	}
	var head [headerBytes]byte
	le := binary.LittleEndian
	le.PutUint32(head[:], recordMagic)
	le.PutUint64(head[8:], uint64(size))
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.f == nil {
		return fmt.Errorf("append to log: %w", tiers.ErrClosed)
	}
	if l.mu.failed != nil {
		return fmt.Errorf("append to log: %w", l.mu.failed)
	}
	l.mu.taking = slices.DeleteFunc(l.mu.taking, func(t take) bool { return t.end <= l.mu.synced })
	least := keeps
	for _, t := range l.mu.taking {
		least = min(least, t.keeps)
	}
	le.PutUint64(head[16:], uint64(l.mu.synced))
	le.PutUint64(head[24:], least)
	w := writer{f: l.mu.f, at: l.mu.written}
	for i := range copies {
		le.PutUint32(head[4:], uint32(k)|(l.mu.next+i)%numbers<<8)
		le.PutUint32(head[headerBytes-4:], l.sum(head[:], parts...))
		w.add(head[:])
		for _, p := range parts {
			w.add(p)
		}
	}
	w.flush()
	if err := w.err; err != nil {
		// Part of it may be there: cut it, so that a later record is not hidden behind
		// it, nor this one found behind that.
		if e := l.mu.f.Truncate(l.mu.written); e != nil {
			l.mu.failed = fmt.Errorf("cut log: %w", e)
		}
		return wrap("append to log", err)
	}
	l.mu.next = (l.mu.next + copies) % numbers
	l.mu.written = w.at
	if keeps != KeepsAll {
		l.mu.taking = append(l.mu.taking, take{l.mu.written, keeps})
	}
	return nil
}

// Size returns the bytes written and the bytes that are safe from a power cut.
func (l *Log) Size() (written, synced int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.written, l.mu.synced
}

// Sync makes everything appended so far safe from a power cut. If it fails the
// log is of no more use: what the system could not write it may forget, and
// report success the next time. Then Sync and Append fail until another log
// takes its place.
func (l *Log) Sync() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	return l.sync()
}

// sync is Sync; syncing is held, so that only Remove takes the file away meanwhile.
func (l *Log) sync() error {
	l.mu.Lock()
	f, written, failed := l.mu.f, l.mu.written, l.mu.failed
	l.mu.using = f != nil && failed == nil && written > l.mu.synced
	using := l.mu.using
	l.mu.Unlock()
	if failed != nil {
		return fmt.Errorf("sync log: %w", failed)
	}
	if !using {
		return nil
	}
	err := f.Sync()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.using = false
	if l.mu.f == nil { // Remove left it open
		f.Close()
	}
	if err != nil {
		l.mu.failed = wrap("an earlier sync", err)
		return wrap("sync log", err)
	}
	if l.mu.failed != nil { // an append could not be taken back meanwhile
		return fmt.Errorf("sync log: %w", l.mu.failed)
	}
	l.mu.synced = written
	return nil
}

// Close syncs and closes the file.
func (l *Log) Close() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	err := l.sync()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.f == nil {
		return err
	}
	err = errors.Join(err, l.mu.f.Close())
	l.mu.f = nil
	return err
}

// Remove closes the log and deletes its file. It does not wait for a sync: that
// then closes the file, so that its error is the disk's own.
func (l *Log) Remove() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.f != nil && !l.mu.using {
		l.mu.f.Close()
	}
	l.mu.f = nil
	return l.fs.Remove(l.path)
}
