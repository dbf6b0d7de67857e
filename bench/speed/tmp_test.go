package speed
import ("testing";"kvtier/bench/planted";"kvtier/server/sparse")
func BenchmarkTmp(b *testing.B) {
	o := AttendOptions{Tokens: []int{131072}, Threads: 1}
	o.fill()
	plain, err := planted.NewPlain(b.Context(), planted.Shape{HeadDim: o.HeadDim, Group: o.Group}, 131072, 1, o.Say)
	if err != nil { b.Fatal(err) }
	l, err := newLayer(plain, o, 131072)
	if err != nil { b.Fatal(err) }
	defer l.close()
	for _, share := range []float32{.2,.1} {
	name := "s2"; if share==.1 {name="s1"}
	b.Run(name, func(b *testing.B) {
		i := 0
		for b.Loop() {
			i++
			if _, err := l.answer(b.Context(), 131072, l.queries(131072, i%4), &sparse.Budget{Share: share}, 1); err != nil { b.Fatal(err) }
		}
	})
	}
}
