package speed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// Shape is one layer's K/V and the queries of one position.
type Shape struct {
	Tokens, HeadDim, KVHeads, QueryHeads int
}

func (s Shape) check() error {
	switch d := s.HeadDim; {
	case d%16 != 0 || d < 16 || d > 256:
		return fmt.Errorf("a head dimension of %d is no multiple of 16 up to 256", d)
	case s.KVHeads < 1 || s.QueryHeads < s.KVHeads || s.QueryHeads%s.KVHeads != 0:
		return fmt.Errorf("%d query heads are no multiple of %d KV heads", s.QueryHeads, s.KVHeads)
	case s.Tokens < 1:
		return fmt.Errorf("a context of %d tokens: it needs 1 at least", s.Tokens)
	}
	return nil
}

// Peer is ggml's flash attention over made-up K/V of one shape, in a process of
// its own (kvtier.bench.ggml), which waits while others are timed. It is for
// one goroutine.
type Peer struct {
	About PeerAbout
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *json.Decoder
	said  bytes.Buffer // on standard error
}

// PeerAbout says what is measured.
type PeerAbout struct {
	Version  string   `json:"version"`
	Commit   string   `json:"commit"`
	Features []string `json:"features"` // instruction sets it was built for
}

// String names the version and what it was built for.
func (a PeerAbout) String() string {
	return fmt.Sprintf("ggml %s (%s), built for %s", a.Version, a.Commit, strings.Join(a.Features, " "))
}

// StartPeer starts the program with a Python that has the package kvtier. The
// error says what to install if there is no ggml.
func StartPeer(ctx context.Context, python string, s Shape) (*Peer, error) {
	p := &Peer{cmd: exec.CommandContext(ctx, python, "-m", "kvtier.bench.ggml", "--tokens", strconv.Itoa(s.Tokens),
		"--head-dim", strconv.Itoa(s.HeadDim), "--kv-heads", strconv.Itoa(s.KVHeads), "--query-heads", strconv.Itoa(s.QueryHeads))}
	p.cmd.Stderr = &p.said
	// Huge pages, as our memory has them.
	p.cmd.Env = append(os.Environ(), "GLIBC_TUNABLES=glibc.malloc.hugetlb=1")
	in, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("ggml: %w", err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("ggml: %w", err)
	}
	p.in, p.out = in, json.NewDecoder(out)
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("ggml: %w", err)
	}
	if err := p.out.Decode(&p.About); err != nil {
		return nil, p.failed(err)
	}
	return p, nil
}

// PeerTime is one answer of an operator.
type PeerTime struct {
	Seconds float64 `json:"seconds"`
	Error   float64 `json:"error"` // relative, of its output against attention over the same K/V in numpy
}

// Time has it answer one query position. The first time it also makes the K/V
// and what to compare outputs with.
func (p *Peer) Time(w PeerWay, threads int) (t PeerTime, err error) {
	asked := struct {
		PeerWay
		Threads int `json:"threads"`
	}{w, threads}
	if err := json.NewEncoder(p.in).Encode(asked); err != nil {
		return t, p.failed(err)
	}
	if err := p.out.Decode(&t); err != nil {
		return t, p.failed(err)
	}
	return t, nil
}

// failed ends the process and returns what it said, if it said anything.
func (p *Peer) failed(err error) error {
	p.Close()
	if said := strings.TrimPrefix(strings.TrimSpace(p.said.String()), "kvbench: "); said != "" {
		return errors.New(said)
	}
	return fmt.Errorf("ggml: %w", err)
}

// Close ends the process.
func (p *Peer) Close() {
	p.in.Close()
	_ = p.cmd.Wait() // it was told to end; how it ended is of no interest
}
