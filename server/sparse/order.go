package sparse

import "slices"

// sortByUpper sorts keys, which sortKeys returned, by their upper 32 bits; the lower ones of equal keys
// must increase. The result is good until sortKeys is called.
func (s *scratch) sortByUpper(keys []uint64) []uint64 {
	if len(keys) < 64 {
		slices.Sort(keys)
		return keys
	}
	from, to := keys, s.order2[:len(keys)]
	for shift := 32; shift < 64; shift += radixBits {
		var ends [1 << radixBits]int32
		for _, k := range from {
			ends[k>>shift&(1<<radixBits-1)]++
		}
		at := int32(0)
		for i, n := range ends {
			ends[i] = at
			at += n
		}
		for _, k := range from {
			end := &ends[k>>shift&(1<<radixBits-1)]
			to[*end] = k
			*end++
		}
		from, to = to, from
	}
	return from
}

// radixBits is how many bits a pass of sortByUpper sorts by.
const radixBits = 11
