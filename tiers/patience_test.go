package tiers

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func out(p *Patience) bool {
	select {
	case <-p.Over():
		return true
	default:
		return false
	}
}

// Only waiting counts, and that of several at once but once.
func TestPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPatience(100 * time.Millisecond)
		time.Sleep(time.Hour) // nobody waits
		wait := func(d time.Duration) {
			p.Begin()
			defer p.End()
			time.Sleep(d)
		}
		wait(30 * time.Millisecond)
		time.Sleep(time.Hour)
		var all sync.WaitGroup
		for range 5 {
			all.Go(func() { wait(60 * time.Millisecond) })
		}
		all.Wait()
		if out(p) {
			t.Fatal("out after 90 of 100 ms")
		}
		begin := time.Now()
		p.Begin()
		<-p.Over()
		if d := time.Since(begin); d != 10*time.Millisecond {
			t.Errorf("the last waited for %v, not for what was left", d)
		}
		p.End()
		p.Begin() // and who comes later not at all
		<-p.Over()
		p.End()
	})
}

// While somebody who joined computes, waiting costs nothing.
func TestPatienceOfMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPatience(100 * time.Millisecond)
		p.Join()
		p.Join()
		p.Begin()
		time.Sleep(time.Hour) // the other computes
		p.Begin()
		time.Sleep(60 * time.Millisecond)
		p.End() // and goes on
		time.Sleep(time.Hour)
		if out(p) {
			t.Fatal("out after 60 of 100 ms")
		}
		begin := time.Now()
		p.Leave()
		<-p.Over()
		if d := time.Since(begin); d != 40*time.Millisecond {
			t.Errorf("the last waited for %v, not for what was left", d)
		}
		p.End()
		p.Leave()
	})
}

// None is left: Over is closed by the first that would wait.
func TestNoPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPatience(0)
		p.Begin()
		<-p.Over()
		p.End()
	})
}
