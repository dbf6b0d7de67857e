package ram

import (
	"testing"

	"pgregory.net/rapid"

	"kvtier/tiers/memory"
)

// checkSlab proves that blocks cover a slab without gaps, that free blocks never touch, and the sums.
func checkSlab(t *rapid.T, s *slab) {
	at, used := uint32(0), uint32(0)
	for i, b := range s.blocks {
		if b.off != at || b.n == 0 {
			t.Fatalf("block %d at %d, want %d", i, b.off, at)
		}
		if at += b.n; b.owner != nil {
			used += b.n
			if b.owner.slab != s || b.owner.off != b.off || b.owner.n != b.n {
				t.Fatalf("block %d is not where its owner says", i)
			}
			continue
		}
		if i > 0 && s.blocks[i-1].owner == nil {
			t.Fatalf("free blocks %d and %d touch", i-1, i)
		}
		if b.n > s.maxFree {
			t.Fatalf("a free block of %d, bound %d", b.n, s.maxFree)
		}
	}
	if int(at)*grain != len(s.mem) || used != s.used {
		t.Fatalf("%d grains in %d bytes, %d used, counted %d", at, len(s.mem), s.used, used)
	}
}

func TestArena(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := arena{limit: 20 << 20}
		var live, freed []*entry
		t.Repeat(map[string]func(*rapid.T){
			"alloc": func(t *rapid.T) {
				freed = nil
				e := &entry{n: uint32(rapid.IntRange(1, 6000).Draw(t, "n"))}
				if a.alloc(e) {
					live = append(live, e)
				}
			},
			"free": func(t *rapid.T) {
				for range min(len(live), 3) {
					i := rapid.IntRange(0, len(live)-1).Draw(t, "i")
					a.free(live[i])
					freed = append(freed, live[i])
					live = append(live[:i], live[i+1:]...)
				}
			},
			"reclaim": func(t *rapid.T) {
				for _, e := range freed {
					a.reclaim(e)
				}
				live, freed = append(live, freed...), nil
			},
			"window": func(t *rapid.T) {
				freed = nil
				n := uint32(rapid.IntRange(1, 16384).Draw(t, "n"))
				for _, e := range a.window(n, func(e *entry) bool { return true }) {
					a.free(e)
					for i := range live {
						if live[i] == e {
							live = append(live[:i], live[i+1:]...)
							break
						}
					}
				}
				e := &entry{n: n}
				if len(a.slabs) == 0 {
					return
				}
				if len(a.slabs[0].mem) >= int(n)*grain && !a.alloc(e) {
					t.Fatal("no room where all may go")
				}
				if e.slab != nil {
					live = append(live, e)
				}
			},
			"trim": func(t *rapid.T) {
				freed = nil
				for _, s := range a.trim(1) {
					a.mapped -= int64(len(s.mem))
					if err := memory.Unmap(s.mem); err != nil {
						t.Fatal(err)
					}
				}
			},
			"": func(t *rapid.T) {
				for _, s := range a.slabs {
					if s.maxFree > a.maxFree {
						t.Fatalf("a slab has %d free grains, bound %d", s.maxFree, a.maxFree)
					}
				}
				if a.mapped > a.limit {
					t.Fatalf("%d mapped of %d", a.mapped, a.limit)
				}
				for _, s := range a.slabs {
					checkSlab(t, s)
				}
			},
		})
		for _, s := range a.slabs {
			_ = memory.Unmap(s.mem)
		}
	})
}
