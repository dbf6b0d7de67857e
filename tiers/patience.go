package tiers

import (
	"sync"
	"time"
)

// Patience is how long readers wait for a disk. Those that share one, the KV heads of a call, wait so long together: time
// counts once while any of them waits, and not while none does. Safe for concurrent use.
type Patience struct {
	over chan struct{}
	mu   struct {
		sync.Mutex
		left    time.Duration // when waiting began
		waiting int
		since   time.Time // of the first that waits
		timer   *time.Timer
		out     bool
	}
}

// NewPatience returns a patience that has not begun to run out.
func NewPatience(d time.Duration) *Patience {
	p := &Patience{over: make(chan struct{})}
	p.mu.left = d
	return p
}

// Over is closed once the time is up. It stays that way.
func (p *Patience) Over() <-chan struct{} { return p.over }

// Begin says that somebody waits, until End.
func (p *Patience) Begin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.waiting++; p.mu.waiting > 1 || p.mu.out {
		return
	}
	p.mu.since = time.Now()
	if p.mu.timer == nil {
		p.mu.timer = time.AfterFunc(p.mu.left, p.look)
	} else {
		p.mu.timer.Reset(p.mu.left)
	}
}

// End says that somebody waits no longer.
func (p *Patience) End() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.waiting--; p.mu.waiting > 0 || p.mu.out {
		return
	}
	p.mu.timer.Stop()
	if p.mu.left -= time.Since(p.mu.since); p.mu.left <= 0 {
		p.endLocked()
	}
}

// look is called by the timer, which may have been set anew meanwhile.
func (p *Patience) look() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.out || p.mu.waiting == 0 {
		return
	}
	if rest := p.mu.left - time.Since(p.mu.since); rest > 0 {
		p.mu.timer.Reset(rest)
		return
	}
	p.endLocked()
}

func (p *Patience) endLocked() {
	p.mu.out = true
	close(p.over)
}
