package server

import (
	"fmt"
	"sync/atomic"
	"testing"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// smolSpec is SmolLM2-135M's geometry.
func smolSpec() *kvtierv1.ModelSpec {
	return &kvtierv1.ModelSpec{Layers: 30, QueryHeads: 9, KvHeads: 3, HeadDim: 64, Fingerprint: []byte("bench"),
		KvDtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16}
}

// BenchmarkStepAppend appends one token to all layers: one record in the log,
// written when the last layer has it. With sync it is made power-safe, too.
func BenchmarkStepAppend(b *testing.B) {
	for _, sync := range []bool{false, true} {
		b.Run(fmt.Sprintf("sync=%v", sync), func(b *testing.B) {
			srv := openServer(b, b.TempDir(), Options{})
			spec := smolSpec()
			m := newModel(1, spec, 1024)
			s := openSequence(b, srv, &kvtierv1.OpenSequenceRequest{Spec: spec})
			row := int(spec.KvHeads * spec.HeadDim)
			var k, v [][]byte
			for l := range int(spec.Layers) {
				k, v = append(k, bf16Bytes(m.k[l][:row])), append(v, bf16Bytes(m.v[l][:row]))
			}
			ctx := b.Context()
			b.ReportAllocs()
			b.SetBytes(int64(s.spec.tokenBytes()))
			at := uint64(0)
			for b.Loop() {
				for l := range k {
					if err := s.append(ctx, &appendRequest{layer: l, start: at, k: k[l], v: v[l]}); err != nil {
						b.Fatal(err)
					}
				}
				at++
				if sync {
					if err := s.syncLog(); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// BenchmarkAttend answers one layer's query over a sealed context.
func BenchmarkAttend(b *testing.B) {
	spec := smolSpec()
	spec.Layers = 1
	const n = 8192 + recentTokens
	m := newModel(1, spec, n)
	for _, c := range []struct {
		name   string
		budget budget
	}{{"exact", exactBudget}, {"share=.2", shareBudget(.2)}, {"share=.1", shareBudget(.1)}} {
		b.Run(c.name, func(b *testing.B) {
			srv := openServer(b, b.TempDir(), Options{ReadAllTokens: -1})
			s := openSequence(b, srv, &kvtierv1.OpenSequenceRequest{Spec: spec})
			m.feed(b, s, 0, n)
			waitSealed(b, s, 8192)
			b.ReportAllocs()
			var bytes, full atomic.Int64
			for b.Loop() {
				a := m.ask(b, s, 0, n-1, c.budget)
				bytes.Add(int64(a.account.BytesRam + a.account.BytesNvme))
				full.Add(int64(a.account.BytesFull))
			}
			b.ReportMetric(float64(bytes.Load())/float64(full.Load()), "share")
		})
	}
}
