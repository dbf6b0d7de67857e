package server

import (
	"testing"

	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// The first tokens and a tail of several blocks are attended to exactly, whatever type their rows are stored in.
func TestExactZoneOfEachType(t *testing.T) {
	const n = 2048 + 2*zoneBlock + 77
	for typ, tolerance := range map[compress.ElementType]float32{compress.F32: 1e-5, compress.BF16: 1e-5, compress.F16: 1e-3} {
		spec := testSpec()
		spec.KvDtype = kvtierv1.ElementType(typ)
		m := newModel(5, spec, n)
		s := openSequence(t, openServer(t, t.TempDir(), Options{}), &kvtierv1.OpenSequenceRequest{Spec: spec, Profile: kvtierv1.Profile_PROFILE_EXACT})
		for l := range m.k {
			k, v := make([]byte, len(m.k[l])*typ.Size()), make([]byte, len(m.v[l])*typ.Size())
			compress.FromFloat32(k, m.k[l], typ)
			compress.FromFloat32(v, m.v[l], typ)
			if err := s.append(t.Context(), &appendRequest{layer: l, k: k, v: v}); err != nil {
				t.Fatal(err)
			}
		}
		m.check(t, s, zoneBlock-1, exactBudget, tolerance)
		waitSealed(t, s, 2048)
		m.check(t, s, n-1, exactBudget, tolerance)
	}
}
