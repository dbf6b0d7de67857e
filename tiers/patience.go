package tiers

import (
	"sync"
	"time"
)

// Patience is how long readers wait for a disk. Those that share one, the KV heads of a call, wait so long together, and time
// counts only while all of them do: as long as any has something to compute, nobody is kept waiting by the disk. Safe for concurrent use.
type Patience struct {
	over chan struct{}
	mu   struct {
		sync.Mutex
		left            time.Duration // when the time began to count
		joined, waiting int
		counts          bool
		since           time.Time // that it counts
		timer           *time.Timer
		out             bool
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

// Join says that somebody is at work, until Leave: only while it waits does time count. Who does not join only waits.
func (p *Patience) Join() { p.change(1, 0) }

// Leave is the end of Join.
func (p *Patience) Leave() { p.change(-1, 0) }

// Begin says that somebody waits, until End.
func (p *Patience) Begin() { p.change(0, 1) }

// End says that somebody waits no longer.
func (p *Patience) End() { p.change(0, -1) }

func (p *Patience) change(joined, waiting int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.joined, p.mu.waiting = p.mu.joined+joined, p.mu.waiting+waiting
	counts := p.mu.waiting > 0 && p.mu.waiting >= p.mu.joined
	if counts == p.mu.counts || p.mu.out {
		return
	}
	if p.mu.counts = counts; !counts {
		p.mu.timer.Stop()
		if p.mu.left -= time.Since(p.mu.since); p.mu.left <= 0 {
			p.endLocked()
		}
		return
	}
	p.mu.since = time.Now()
	if p.mu.timer == nil {
		p.mu.timer = time.AfterFunc(p.mu.left, p.look)
	} else {
		p.mu.timer.Reset(p.mu.left)
	}
}

// look is called by the timer, which may have been set anew meanwhile.
func (p *Patience) look() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.out || !p.mu.counts {
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
