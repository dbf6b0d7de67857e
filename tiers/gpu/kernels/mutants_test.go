package kernels

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda/cudatest"
)

// ordering are the instructions that keep threads and copies in order.
var ordering = regexp.MustCompile(`(?m)^\s*(bar\.sync|bar\.warp\.sync|cp\.async\.wait_group|cp\.async\.commit_group)[^;]*;`)

const (
	mutantChild = "KERNELS_TEST_MUTANT"
	survived    = "SURVIVED"
)

// TestMutants leaves out of the kernels, one at a time, each instruction that
// orders threads or copies: the emulated device has to find an error, or the
// answer has to be wrong. So none of them is there for nothing, and whoever forgets one hears of it.
func TestMutants(t *testing.T) {
	if os.Getenv(mutantChild) != "" {
		mutant(t)
		return
	}
	emulated(t)
	if testing.Short() {
		t.Skip("a process for each instruction")
	}
	for _, d := range HeadDims {
		text, err := embedded(d)
		if err != nil {
			t.Fatal(err)
		}
		places := ordering.FindAllIndex(text, -1)
		if len(places) < 10 {
			t.Fatalf("head dimension %d: %d instructions are no kernels", d, len(places))
		}
		for i, at := range places {
			out, _ := command(t.Name(), fmt.Sprintf("%s=%d:%d", mutantChild, d, i))
			if strings.Contains(out, survived) || !strings.Contains(out, "FOUND") {
				kernel := regexp.MustCompile(`\.entry (\w+)`).FindAllSubmatch(text[:at[0]], -1)
				t.Errorf("head dimension %d, %s, line %d: nobody misses %q\n%s", d, kernel[len(kernel)-1][1],
					1+bytes.Count(text[:at[0]], []byte("\n")), bytes.TrimSpace(text[at[0]:at[1]]), out)
			}
		}
	}
}

// mutant attends with kernels that lack an instruction.
func mutant(t *testing.T) {
	var d, without int
	if _, err := fmt.Sscanf(os.Getenv(mutantChild), "%d:%d", &d, &without); err != nil {
		t.Fatal(err)
	}
	device := cudatest.Open(t)
	a := newAttention(t, device)
	a.text = func(headDim int) ([]byte, error) {
		text, err := embedded(headDim)
		at := ordering.FindAllIndex(text, -1)[without]
		return append(bytes.Clone(text[:at[0]]), text[at[1]:]...), err
	}
	rng := rand.New(rand.NewPCG(11, uint64(d)))
	// Some warp attends drains of two segments, and every warp several units.
	drains := []int{264, 264, 264, 264, 264}
	for _, m := range []shape{{tokens: []int{200, 150}, profile: tiers.ProfileNeutral}, {tokens: drains, profile: tiers.ProfileBalanced}} {
		m.d, m.heads = d, 1
		all := m.make(rng)
		q := m.query(rng, 2, 3)
		outs, lses := dense(t, all, q, 0)
		got, err := answer(a, resident(t, device, all), Warps{4, 4}, q, 0)
		if err == nil {
			if output, lse := differs(got, outs, lses); output > mostError || lse > mostError {
				err = errors.New("another answer")
			}
		}
		if err != nil {
			t.Log("FOUND", err)
			return
		}
	}
	t.Log(survived)
}
