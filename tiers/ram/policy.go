package ram

import (
	"encoding/binary"
	"sync"

	"github.com/dgraph-io/ristretto/v2"

	"kvtier/tiers"
)

// policy asks ristretto who deserves room. It knows keys and costs, never
// bytes. Tier.writes serialises all methods but touch.
type policy struct {
	cache *ristretto.Cache[string, *entry]
	limit int64

	// said is what ristretto's goroutine answered since the last question.
	said struct {
		sync.Mutex
		victims  []*entry
		rejected bool
	}
}

const (
	pieceGuess  = 32 << 10 // bytes of a typical piece
	minCounters = 1 << 14
)

func newPolicy(limit int64) (*policy, error) {
	p := &policy{limit: limit}
	var err error
	p.cache, err = ristretto.NewCache(&ristretto.Config[string, *entry]{
		NumCounters:        max(10*limit/pieceGuess, minCounters),
		MaxCost:            limit,
		BufferItems:        64,
		IgnoreInternalCost: true,
		KeyToHash:          hashKey,
		OnEvict: func(i *ristretto.Item[*entry]) {
			p.said.Lock()
			defer p.said.Unlock()
			if i.Value != nil {
				p.said.victims = append(p.said.victims, i.Value)
			}
		},
		OnReject: func(*ristretto.Item[*entry]) {
			p.said.Lock()
			defer p.said.Unlock()
			p.said.rejected = true
		},
	})
	return p, err
}

// pieceKey names a piece to ristretto.
func pieceKey(id tiers.ID, head int, p tiers.Plane) string {
	b := make([]byte, 0, len(id)+3)
	b = append(b, id[:]...)
	b = binary.LittleEndian.AppendUint16(b, uint16(head))
	return string(append(b, byte(p)))
}

// hashKey makes ristretto's two hashes from different words of the id, which
// is itself a hash: two pieces share both with a chance of 2^-128 a pair. If
// they share the first alone, ristretto refuses the second: a miss, never a wrong piece.
func hashKey(key string) (uint64, uint64) {
	piece := 1 + (uint64(key[32]) | uint64(key[33])<<8 | uint64(key[34])<<16)
	word := func(i int) uint64 { return binary.LittleEndian.Uint64([]byte(key[i : i+8])) }
	return mix(word(0) + piece*0x9e3779b97f4a7c15), mix(word(8) + piece*0xd1342543de82ef95)
}

// mix is the finaliser of splitmix64.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// touch tells ristretto of a use. Tier.mu is held (read), so that the cache is open.
func (p *policy) touch(key string) { p.cache.Get(key) }

// contest asks whether e deserves the room of others, and whose. Neither e nor
// the victims are known to ristretto afterwards: the caller adds back who stays.
// Because e is taken out again, pieces of one Put never evict each other.
func (p *policy) contest(e *entry) (victims []*entry, admitted bool) {
	p.cache.Wait() // Set is buffered: let what was added count
	p.said.victims, p.said.rejected = nil, false
	// The arena has no room for e, though ristretto may think so (holes, pins).
	// With this limit it has to find e's cost among the others.
	used := p.cache.MaxCost() - p.cache.RemainingCost()
	p.cache.UpdateMaxCost(max(used, e.cost()))
	sent := p.cache.Set(e.key, e, e.cost())
	p.cache.Wait()
	p.cache.UpdateMaxCost(p.limit)
	p.said.Lock()
	victims, admitted = p.said.victims, sent && !p.said.rejected
	p.said.Unlock()
	if admitted {
		p.cache.Del(e.key)
	}
	return victims, admitted
}

// add makes a piece known. It is always accepted: room was reserved, so all
// costs together are within the limit.
func (p *policy) add(es ...*entry) {
	for _, e := range es {
		for !p.cache.Set(e.key, e, e.cost()) {
			p.cache.Wait() // the buffer is full
		}
	}
}

// del makes a piece unknown.
func (p *policy) del(es ...*entry) {
	for _, e := range es {
		p.cache.Del(e.key)
	}
}

func (p *policy) close() { p.cache.Close() }
