package server

import (
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
	"kvtier/tiers/files"
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

// logWrites counts what is written to logs.
type logWrites struct {
	files.FS
	bytes atomic.Int64
}

func (w *logWrites) Open(name string, how files.Flag) (files.File, error) {
	f, err := w.FS.Open(name, how)
	if err != nil || filepath.Ext(name) != logSuffix {
		return f, err
	}
	return &countedLog{f, w}, nil
}

type countedLog struct {
	files.File
	w *logWrites
}

func (f *countedLog) WriteAt(b []byte, off int64) (int, error) {
	n, err := f.File.WriteAt(b, off)
	f.w.bytes.Add(int64(n))
	return n, err
}

// BenchmarkPrefillWrites appends 32,768 tokens of SmolLM2's geometry, as fast as it may or no faster than they are sealed, and
// says how many bytes logs and segments took for each that was appended.
func BenchmarkPrefillWrites(b *testing.B) {
	for _, waits := range []bool{false, true} {
		b.Run(fmt.Sprintf("waits=%v", waits), func(b *testing.B) {
			const n, step = 32768, 512
			w := &logWrites{FS: files.OS}
			var segments, appended int64
			for b.Loop() {
				srv := openServer(b, b.TempDir(), Options{FS: w})
				spec := smolSpec()
				m := newModel(1, spec, step)
				s := openSequence(b, srv, &kvtierv1.OpenSequenceRequest{Spec: spec})
				for at := uint64(0); at < n; at += step {
					for l := range int(spec.Layers) {
						r := appendRequest{layer: l, start: at, k: bf16Bytes(m.k[l]), v: bf16Bytes(m.v[l])}
						for err := s.append(b.Context(), &r); err != nil; err = s.append(b.Context(), &r) {
							if e := toError(err); e.Code != codes.ResourceExhausted {
								b.Fatal(err)
							}
							time.Sleep(10 * time.Millisecond)
						}
					}
					if waits && at+step > tiers.SegmentTokens+recentTokens {
						waitSealed(b, s, (at+step-recentTokens)/tiers.SegmentTokens*tiers.SegmentTokens)
					}
				}
				waitSealed(b, s, (n-recentTokens)/tiers.SegmentTokens*tiers.SegmentTokens)
				_, disk := srv.store.Usage()
				segments, appended = segments+disk.BytesWritten, appended+int64(n*s.spec.tokenBytes())
				closeServer(b, srv)
			}
			b.ReportMetric(float64(w.bytes.Load())/float64(appended), "log/byte")
			b.ReportMetric(float64(segments)/float64(appended), "segments/byte")
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
