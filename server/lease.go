package server

import (
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
)

const (
	defaultLease = 60 * time.Second
	maxLease     = time.Hour
)

// lease ties what a worker holds to the worker: when it is revoked, or not
// renewed in time, everything is released.
type lease struct {
	id      uint64
	holder  string
	ttl     time.Duration
	expires time.Time // zero: lives until revoked (a connection)
	release map[uint64]func()
	next    uint64
}

// leaseTable holds the leases and ends those that were not renewed.
type leaseTable struct {
	stop chan struct{}
	done sync.WaitGroup
	mu   struct {
		sync.Mutex
		leases map[uint64]*lease
		next   uint64
	}
}

func newLeaseTable() *leaseTable {
	t := &leaseTable{stop: make(chan struct{})}
	t.mu.leases = map[uint64]*lease{}
	t.done.Add(1)
	go func() {
		defer t.done.Done()
		tick := time.NewTicker(250 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-t.stop:
				return
			case now := <-tick.C:
				t.expire(now)
			}
		}
	}()
	return t
}

func (t *leaseTable) close() {
	close(t.stop)
	t.done.Wait()
}

// create starts a lease; ttl 0 lives until it is revoked.
func (t *leaseTable) create(ttl time.Duration, holder string) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mu.next++
	l := &lease{id: t.mu.next, holder: holder, ttl: ttl, release: map[uint64]func(){}}
	if ttl > 0 {
		l.expires = time.Now().Add(ttl)
	}
	t.mu.leases[l.id] = l
	return l.id
}

func errNoLease(id uint64) error {
	return fail(codes.NotFound, ReasonUnknown, "no lease %d: it ended or was never made; create a new one and open your sequences again", id)
}

func (t *leaseTable) renew(id uint64) (time.Duration, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.mu.leases[id]
	if l == nil {
		return 0, errNoLease(id)
	}
	if l.ttl > 0 {
		l.expires = time.Now().Add(l.ttl)
	}
	return l.ttl, nil
}

// attach lets release be called when the lease ends. detach takes it back.
func (t *leaseTable) attach(id uint64, release func()) (detach func(), err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.mu.leases[id]
	if l == nil {
		return nil, errNoLease(id)
	}
	l.next++
	key := l.next
	l.release[key] = release
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(l.release, key)
	}, nil
}

// revoke ends a lease and releases what it holds.
func (t *leaseTable) revoke(id uint64) error {
	t.mu.Lock()
	l := t.mu.leases[id]
	delete(t.mu.leases, id)
	t.mu.Unlock()
	if l == nil {
		return errNoLease(id)
	}
	t.end(l)
	return nil
}

func (t *leaseTable) expire(now time.Time) {
	t.mu.Lock()
	var over []*lease
	for id, l := range t.mu.leases {
		if l.ttl > 0 && now.After(l.expires) {
			over = append(over, l)
			delete(t.mu.leases, id)
		}
	}
	t.mu.Unlock()
	for _, l := range over {
		t.end(l)
	}
}

// end releases in the reverse order of attaching.
func (t *leaseTable) end(l *lease) {
	t.mu.Lock()
	var keys []uint64
	for k := range l.release {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	slices.Reverse(keys)
	var todo []func()
	for _, k := range keys {
		todo = append(todo, l.release[k])
	}
	clear(l.release)
	t.mu.Unlock()
	for _, f := range todo {
		f()
	}
}

func (t *leaseTable) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.mu.leases)
}
