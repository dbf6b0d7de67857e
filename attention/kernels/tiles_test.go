package kernels

import (
	"context"
	"io"
	"math/rand/v2"
	"runtime"
	"runtime/pprof"
	"slices"
	"sync"
	"testing"
	"time"
)

// Tile registers are neither lost nor mixed up where signals come in and goroutines change threads all the time.
func TestTilesUnderSignals(t *testing.T) {
	if !slices.Contains(Variants(), AMX) {
		t.Skip("this processor has no tiles, or the kernel does not give them")
	}
	defer Use(AMX)()
	if err := pprof.StartCPUProfile(io.Discard); err == nil { // else there is a profile already, whose signals do as well
		defer pprof.StopCPUProfile()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			runtime.GC() // which interrupts all the others
		}
	})
	for i := range 4 * runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			rows, groups, leaves := 4+rng.IntN(6), 8+rng.IntN(mostGroups-7), 16
			l, planes := leaf(rng, groups)
			steps := make([]int, len(planes)) // all leaves are the same one
			q := KeyQuery{Words: make([]int16, groups*rows*LineTokens), Scale: odd(rng, 2*rows)}
			for i := range q.Words {
				q.Words[i] = int16(rng.IntN(2*mostWord+1) - mostWord)
			}
			n, d := ValueTokens-rng.IntN(20), 16*groups
			scales, codes, w := slices.Repeat(valueScale(1, 7), n), oddBytes(rng, n*d/2), odd(rng, rows*n)
			compute := func() (scores, sums []float32) {
				scores, sums = make([]float32, rows*leaves*LineTokens), make([]float32, rows*d)
				ScoreLeaves(scores, LineTokens, leaves*LineTokens, q, &l, planes, steps, leaves, 0)
				var b ValueBatch
				b.AppendRun(scales, codes, nil, n, d, 0)
				b.AddTo(rowsOf(sums, d), w, n)
				return scores, sums
			}
			scores, sums := compute()
			for ctx.Err() == nil {
				a, b := compute()
				if !slices.Equal(a, scores) || !slices.Equal(b, sums) {
					t.Errorf("%d rows, %d groups: the same again came out differently", rows, groups)
					return
				}
				runtime.Gosched()
			}
		})
	}
	wg.Wait()
}
