package cuda_test

import (
	"testing"

	"kvtier/tiers/gpu/cuda"
)

func BenchmarkDo(b *testing.B) {
	d, err := cuda.Open(0)
	if err != nil {
		b.Skip(err)
	}
	defer d.Close()
	b.Run("one", func(b *testing.B) {
		for b.Loop() {
			_ = d.Do(ctx, func(c *cuda.Context) error { return nil })
		}
	})
	b.Run("many", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				_ = d.Do(ctx, func(c *cuda.Context) error { return nil })
			}
		})
	})
	var e cuda.Event
	_ = d.Do(ctx, func(c *cuda.Context) error { e, err = c.NewEvent(false); return err })
	b.Run("wait", func(b *testing.B) {
		for b.Loop() {
			_ = d.Wait(ctx, e)
		}
	})
}
