package main

import (
	"fmt"
	"time"

	"kvtier/cmd/internal/size"
)

// progress writes how far a check is: over one line on a terminal, else a line now and then.
type progress struct {
	a        *app
	verb     string
	quiet    bool
	terminal bool
	start    time.Time
	next     time.Time
	drawn    bool
}

func newProgress(a *app, verb string, quiet bool) *progress {
	now := a.now()
	return &progress{a: a, verb: verb, quiet: quiet, terminal: isTerminal(a.err), start: now, next: now}
}

// show says that so many bytes of a total are done, and what else there is to say.
func (p *progress) show(done, total uint64, finished bool, more string) {
	now := p.a.now()
	if p.quiet || (now.Before(p.next) && !finished) {
		return
	}
	line := fmt.Sprintf("%s: %s of %s (%s)", p.verb, size.Format(done), size.Format(total), percent(done, total))
	if more != "" {
		line += ", " + more
	}
	if took := now.Sub(p.start); took >= time.Second {
		line += fmt.Sprintf(", %s/s", size.Format(uint64(float64(done)/took.Seconds())))
		if done > 0 && done < total {
			line += fmt.Sprintf(", %s left", duration(time.Duration(float64(took)*float64(total-done)/float64(done))))
		}
	}
	if p.terminal {
		fmt.Fprintf(p.a.err, "\r\x1b[K%s", line)
		p.next, p.drawn = now.Add(100*time.Millisecond), true
		return
	}
	fmt.Fprintln(p.a.err, line)
	p.next = now.Add(5 * time.Second)
}

// end leaves the line, so that what follows starts on its own.
func (p *progress) end() {
	if p.drawn {
		fmt.Fprintln(p.a.err)
	}
}
