package filestest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"

	"kvtier/tiers/files"
)

// Disk is a file system in memory. It implements files.FS. Safe for concurrent
// use.
type Disk struct {
	mu struct {
		sync.Mutex
		base   image // durable when the disk was made
		live   image // as who uses the disk sees it
		trace  []op
		ops    int // those of the trace that count
		next   inode
		locked map[string]int // how many share a lock; exclusive: somebody has it
		faults faults
	}
}

type inode int

const root inode = 0

// node is a file or a directory. What an image holds is never changed in
// place, but for nodes that own says are the image's alone.
type node struct {
	names   map[string]inode // of a directory
	ordered bool             // its names survive a power cut in the order of their changes
	data    []byte           // of a file
}

type image struct {
	nodes map[inode]*node
	own   map[inode]bool
}

// op is a change in the trace.
type op struct {
	kind   opKind
	node   inode  // the file or directory that it concerns
	name   string // in the directory
	child  inode  // that gets the name
	rename string // name that the child had before, if it is renamed
	dir    bool   // opMake
	sorted bool   // opMake: a directory whose names survive in order
	off    int64
	data   []byte
	path   string // of a file or directory that is synced or changed, for messages
	counts bool
}

func (o *op) String() string {
	switch o.kind {
	case opMake:
		return ""
	case opLink:
		if o.rename != "" {
			return fmt.Sprintf("rename %s to %s", path.Join(o.path, o.rename), o.name)
		}
		return "make " + path.Join(o.path, o.name)
	case opUnlink:
		return "remove " + path.Join(o.path, o.name)
	case opWrite:
		return fmt.Sprintf("write %s, %d bytes at %d", o.path, len(o.data), o.off)
	case opTruncate:
		return fmt.Sprintf("truncate %s to %d", o.path, o.off)
	}
	if o.kind == opForget {
		return "fail to sync " + o.path
	}
	return "sync " + o.path
}

type opKind uint8

const (
	opMake     opKind = iota // a file or directory without a name
	opLink                   // it gets one, and may lose another
	opUnlink                 // a name goes
	opWrite                  // data at off
	opTruncate               // to length off
	opSync                   // of a file or directory
	opForget                 // a sync failed: some of what was not synced never will be; off is a seed
)

// NewDisk makes an empty disk.
func NewDisk() *Disk {
	base := image{map[inode]*node{root: {names: map[string]inode{}}}, nil}
	return newDisk(base, nil)
}

func newDisk(base image, trace []op) *Disk {
	d := &Disk{}
	d.mu.base, d.mu.live, d.mu.trace, d.mu.locked = base, base.clone(), trace, map[string]int{}
	for id := range base.nodes {
		d.mu.next = max(d.mu.next, id+1)
	}
	for i := range trace {
		d.mu.live.apply(&trace[i])
		d.mu.next = max(d.mu.next, trace[i].node+1)
		if trace[i].counts {
			d.mu.ops++
		}
	}
	return d
}

func (m image) clone() image { return image{maps.Clone(m.nodes), map[inode]bool{}} }

// edit returns a node that may be changed.
func (m image) edit(id inode) *node {
	n := m.nodes[id]
	if !m.own[id] {
		n = &node{maps.Clone(n.names), n.ordered, slices.Clone(n.data)}
		m.nodes[id], m.own[id] = n, true
	}
	return n
}

func (m image) apply(o *op) {
	switch o.kind {
	case opMake:
		n := &node{}
		if o.dir {
			n.names, n.ordered = map[string]inode{}, o.sorted
		}
		m.nodes[o.node], m.own[o.node] = n, true
	case opLink:
		n := m.edit(o.node)
		if o.rename != "" && n.names[o.rename] == o.child {
			delete(n.names, o.rename)
		}
		n.names[o.name] = o.child
	case opUnlink:
		n := m.edit(o.node)
		if n.names[o.name] == o.child {
			delete(n.names, o.name)
		}
	case opWrite:
		n := m.edit(o.node)
		n.resize(max(int64(len(n.data)), o.off+int64(len(o.data))))
		copy(n.data[o.off:], o.data)
	case opTruncate:
		m.edit(o.node).resize(o.off)
	}
}

func (n *node) resize(size int64) {
	if have := int64(len(n.data)); size > have {
		n.data = append(n.data, make([]byte, size-have)...)
	}
	n.data = n.data[:size]
}

// Ops returns how many changes there were since the disk was made. Pebble
// removes files in the background, at moments that no seed decides: those
// changes do not count.
func (d *Disk) Ops() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mu.ops
}

// traceLocked returns the first n changes that count, and those between them.
func (d *Disk) traceLocked(n int) []op {
	for i := range d.mu.trace {
		if n == 0 {
			return d.mu.trace[:i:i]
		}
		if d.mu.trace[i].counts {
			n--
		}
	}
	return slices.Clip(d.mu.trace)
}

// Trace lists changes lo to hi, for messages.
func (d *Disk) Trace(lo, hi int) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var b strings.Builder
	n := 0
	for i := range d.traceLocked(hi) {
		o := &d.mu.trace[i]
		if o.counts {
			n++
		}
		if s := o.String(); s != "" && n > lo {
			fmt.Fprintf(&b, "%d: %s\n", n, s)
		}
	}
	return b.String()
}

// Kill returns the disk as it is when the process that used it dies after n
// changes.
func (d *Disk) Kill(n int) *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return newDisk(d.mu.base, d.traceLocked(n))
}

// PowerCut returns the disk as it may be after power was lost behind the first
// n changes.
func (d *Disk) PowerCut(n int, rng *rand.Rand) *Disk {
	d.mu.Lock()
	trace := d.traceLocked(n)
	m := d.mu.base.clone()
	d.mu.Unlock()
	pending := map[inode][]*op{}
	for i := range trace {
		o := &trace[i]
		switch o.kind {
		case opMake:
			m.apply(o)
		case opSync:
			for _, p := range pending[o.node] {
				m.apply(p)
			}
			delete(pending, o.node)
		case opForget:
			forget := rand.New(rand.NewPCG(uint64(o.off), 0))
			pending[o.node] = slices.DeleteFunc(pending[o.node], func(*op) bool { return forget.IntN(2) == 0 })
		default:
			pending[o.node] = append(pending[o.node], o)
		}
	}
	// Most cuts are a mixture; some lose, or keep, as much as they can.
	keep := []float64{0, 1, rng.Float64(), rng.Float64()}[rng.IntN(4)]
	for _, id := range slices.Sorted(maps.Keys(pending)) {
		if m.nodes[id].ordered {
			pending[id] = pending[id][:int(keep*float64(len(pending[id]))+rng.Float64())]
			for _, o := range pending[id] {
				m.apply(o)
			}
			continue
		}
		for _, o := range pending[id] {
			survive(m, o, keep, rng)
		}
	}
	m.own = nil
	m.sweep()
	return newDisk(m, nil)
}

// survive applies the part of a change that a power cut left.
func survive(m image, o *op, keep float64, rng *rand.Rand) {
	if o.kind != opWrite || rng.IntN(2) == 0 { // lost or kept as a whole
		if rng.Float64() < keep {
			m.apply(o)
		}
		return
	}
	unit := []int64{512, 4096}[rng.IntN(2)]
	end := o.off + int64(len(o.data))
	if size := int64(len(m.nodes[o.node].data)); end > size && rng.Float64() < keep {
		m.apply(&op{kind: opTruncate, node: o.node, off: size + rng.Int64N(end-size) + 1}) // room was made for it
	}
	for lo := o.off; lo < end; {
		hi := min((lo/unit+1)*unit, end)
		if rng.Float64() < keep {
			m.apply(&op{kind: opWrite, node: o.node, off: lo, data: o.data[lo-o.off : hi-o.off]})
		}
		lo = hi
	}
}

// sweep removes what has no name.
func (m image) sweep() {
	named := map[inode]bool{}
	var visit func(id inode)
	visit = func(id inode) {
		named[id] = true
		for _, child := range m.nodes[id].names {
			visit(child)
		}
	}
	visit(root)
	maps.DeleteFunc(m.nodes, func(id inode, _ *node) bool { return !named[id] })
}

// Walk calls fn for every file, in the order of names.
func (d *Disk) Walk(fn func(name string, data []byte) error) error {
	d.mu.Lock()
	m := d.mu.live.clone()
	d.mu.live.own = map[inode]bool{} // shared now
	d.mu.Unlock()
	var visit func(name string, n *node) error
	visit = func(name string, n *node) error {
		if n.names == nil {
			return fn(name, n.data)
		}
		for _, child := range slices.Sorted(maps.Keys(n.names)) {
			if err := visit(path.Join(name, child), m.nodes[n.names[child]]); err != nil {
				return err
			}
		}
		return nil
	}
	return visit("/", m.nodes[root])
}

func (d *Disk) doLocked(o op) {
	if o.counts = o.kind != opUnlink || !d.mu.live.nodes[o.node].ordered; o.counts {
		d.mu.ops++
	}
	d.mu.live.apply(&o)
	d.mu.trace = append(d.mu.trace, o)
}

func failure(what, name string, err error) error {
	return &fs.PathError{Op: what, Path: name, Err: err}
}

// findLocked finds what a name leads to.
func (d *Disk) findLocked(name string) (inode, error) {
	at := root
	for part := range strings.SplitSeq(strings.Trim(path.Clean(name), "/"), "/") {
		if part == "" || part == "." {
			continue
		}
		n := d.mu.live.nodes[at]
		if n.names == nil {
			return 0, failure("open", name, syscall.ENOTDIR)
		}
		child, ok := n.names[part]
		if !ok {
			return 0, failure("open", name, fs.ErrNotExist)
		}
		at = child
	}
	return at, nil
}

// dirLocked finds the directory of a name, and the name in it.
func (d *Disk) dirLocked(name string) (dir inode, base string, err error) {
	dir, err = d.findLocked(path.Dir(name))
	if err == nil && d.mu.live.nodes[dir].names == nil {
		err = failure("open", name, syscall.ENOTDIR)
	}
	return dir, path.Base(name), err
}

// makeLocked makes a file or directory that does not exist.
func (d *Disk) makeLocked(name string, make op) (inode, error) {
	dir, base, err := d.dirLocked(name)
	if err != nil {
		return 0, err
	}
	if _, ok := d.mu.live.nodes[dir].names[base]; ok {
		return 0, failure("create", name, fs.ErrExist)
	}
	id := d.mu.next
	d.mu.next++
	make.kind, make.node = opMake, id
	d.doLocked(make)
	d.doLocked(op{kind: opLink, node: dir, name: base, child: id, path: path.Dir(name)})
	return id, nil
}

// Open implements files.FS.
func (d *Disk) Open(name string, how files.Flag) (files.File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.failLocked("open", name, 0, how&files.Create != 0); err != nil {
		return nil, err
	}
	return d.openLocked(name, how)
}

func (d *Disk) openLocked(name string, how files.Flag) (*file, error) {
	var id inode
	var err error
	if how&files.Create != 0 {
		id, err = d.makeLocked(name, op{})
	} else {
		id, err = d.findLocked(name)
	}
	if err == nil && d.mu.live.nodes[id].names != nil {
		err = failure("open", name, syscall.EISDIR)
	}
	if err != nil {
		return nil, err
	}
	return &file{d: d, id: id, name: name, direct: how&files.Direct != 0, readOnly: how&files.Read != 0}, nil
}

// Remove implements files.FS.
func (d *Disk) Remove(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.failLocked("remove", name, 0, false); err != nil {
		return err
	}
	return d.removeLocked(name)
}

func (d *Disk) removeLocked(name string) error {
	dir, base, err := d.dirLocked(name)
	if err != nil {
		return err
	}
	child, ok := d.mu.live.nodes[dir].names[base]
	if !ok {
		return failure("remove", name, fs.ErrNotExist)
	}
	if len(d.mu.live.nodes[child].names) > 0 {
		return failure("remove", name, syscall.ENOTEMPTY)
	}
	d.doLocked(op{kind: opUnlink, node: dir, name: base, child: child, path: path.Dir(name)})
	return nil
}

// Rename implements files.FS, inside one directory.
func (d *Disk) Rename(oldname, newname string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.failLocked("rename", oldname, 0, true); err != nil {
		return err
	}
	return d.renameLocked(oldname, newname)
}

func (d *Disk) renameLocked(oldname, newname string) error {
	dir, base, err := d.dirLocked(oldname)
	if err != nil {
		return err
	}
	to, newbase, err := d.dirLocked(newname)
	if err != nil {
		return err
	}
	child, ok := d.mu.live.nodes[dir].names[base]
	switch {
	case !ok:
		return failure("rename", oldname, fs.ErrNotExist)
	case dir != to:
		return failure("rename", newname, errors.ErrUnsupported)
	}
	d.doLocked(op{kind: opLink, node: dir, name: newbase, child: child, rename: base, path: path.Dir(oldname)})
	return nil
}

// MkdirAll implements files.FS.
func (d *Disk) MkdirAll(dir string) error {
	if dir = path.Clean(dir); dir == "/" || dir == "." {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.failLocked("mkdir", dir, 0, true); err != nil {
		return err
	}
	return d.mkdirLocked(dir, false)
}

// mkdirLocked makes a directory for Pebble, or for others.
func (d *Disk) mkdirLocked(dir string, pebble bool) error {
	id, err := d.findLocked(dir)
	if !errors.Is(err, fs.ErrNotExist) {
		if err == nil && d.mu.live.nodes[id].names == nil {
			err = failure("mkdir", dir, syscall.ENOTDIR)
		}
		return err
	}
	if err := d.mkdirLocked(path.Dir(dir), pebble); err != nil {
		return err
	}
	if _, err := d.makeLocked(dir, op{dir: true, sorted: pebble}); err != nil || pebble {
		return err // Pebble makes names durable itself
	}
	parent, _, _ := d.dirLocked(dir) // it was there just now
	d.doLocked(op{kind: opSync, node: parent, path: path.Dir(dir)})
	return nil
}

// List implements files.FS.
func (d *Disk) List(dir string) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	id, err := d.findLocked(dir)
	if err != nil {
		return nil, err
	}
	n := d.mu.live.nodes[id]
	if n.names == nil {
		return nil, failure("list", dir, syscall.ENOTDIR)
	}
	return slices.Sorted(maps.Keys(n.names)), nil
}

// SyncDir implements files.FS.
func (d *Disk) SyncDir(dir string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	id, err := d.findLocked(dir)
	if err != nil {
		return err
	}
	if err := d.failLocked("sync", dir, 0, false); err != nil {
		return err
	}
	d.doLocked(op{kind: opSync, node: id, path: dir})
	return nil
}

// Free implements files.FS: there is always room.
func (d *Disk) Free(string) (int64, error) { return 1 << 40, nil }

// exclusive is the count of a lock that somebody has.
const exclusive = -1

// Lock implements files.FS.
func (d *Disk) Lock(name string) (io.Closer, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.locked[name] != 0 {
		return nil, files.ErrLocked
	}
	if _, err := d.makeLocked(name, op{}); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	d.mu.locked[name] = exclusive
	return lock{d, name}, nil
}

// Share implements files.FS.
func (d *Disk) Share(name string) (io.Closer, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.findLocked(name); err != nil {
		return nil, err
	}
	if d.mu.locked[name] == exclusive {
		return nil, files.ErrLocked
	}
	d.mu.locked[name]++
	return lock{d, name}, nil
}

type lock struct {
	d    *Disk
	name string
}

func (l lock) Close() error {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	l.d.mu.locked[l.name] = max(l.d.mu.locked[l.name]-1, 0)
	return nil
}

// file implements files.File.
type file struct {
	d      *Disk
	id     inode
	name   string
	direct bool
	pebble bool // it cannot go on after a failed write

	readOnly bool
}

func (f *file) ReadAt(b []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	data := f.d.mu.live.nodes[f.id].data
	if off >= int64(len(data)) {
		return 0, io.EOF
	}
	n := copy(b, data[off:])
	n, err := f.faultyReadLocked(b[:n], off)
	if n < len(b) && err == nil {
		err = io.EOF
	}
	return n, err
}

func (f *file) WriteAt(b []byte, off int64) (int, error) {
	if f.readOnly {
		return 0, failure("write", f.name, syscall.EBADF)
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	n, off, err := f.faultyWriteLocked(len(b), off)
	if n > 0 && off >= 0 {
		f.d.doLocked(op{kind: opWrite, node: f.id, off: off, data: slices.Clone(b[:n]), path: f.name})
	}
	return n, err
}

func (f *file) Truncate(size int64) error {
	if f.readOnly {
		return failure("truncate", f.name, syscall.EINVAL)
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if !f.pebble {
		if err := f.d.failLocked("truncate", f.name, 0, true); err != nil {
			return err
		}
	}
	f.d.doLocked(op{kind: opTruncate, node: f.id, off: size, path: f.name})
	return nil
}

func (f *file) Allocate(size int64) error {
	if err := f.Truncate(size); err != nil {
		return err
	}
	return f.Sync()
}

func (f *file) Size() (int64, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return int64(len(f.d.mu.live.nodes[f.id].data)), nil
}

func (f *file) Direct() bool { return f.direct }

func (f *file) Sync() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if !f.pebble {
		if err := f.d.failLocked("sync", f.name, 0, false); err != nil {
			f.d.doLocked(op{kind: opForget, node: f.id, off: f.d.mu.faults.rng.Int64(), path: f.name})
			return err
		}
	}
	f.d.doLocked(op{kind: opSync, node: f.id, path: f.name})
	return nil
}

func (f *file) Close() error { return nil }

// String lists the files, for messages.
func (d *Disk) String() string {
	var b strings.Builder
	_ = d.Walk(func(name string, data []byte) error {
		_, err := fmt.Fprintf(&b, "%10d %s\n", len(data), name)
		return err
	})
	return b.String()
}
