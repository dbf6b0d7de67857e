package main

import (
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"kvtier/bench/quality"
	"kvtier/bench/synth"
)

const shapeHelp = `Measure heads of real models and made ones side by side: how keys are spread, where attention goes, how often it goes there again.

Contexts of 'kvbench million' are made up; this shows how far they are like real ones. Real heads come from dumps
('python -m kvtier.capture' writes them); of each, the last 128 positions are asked. Without dumps only made heads are measured.

Of each figure the table has the median over query heads and, in brackets, the tenth and the ninetieth percentile.`

func newShape() *cobra.Command {
	var dumps []string
	var scale float64
	var asJSON bool
	g := synth.Geometry{Tokens: 8192, Layers: 4, KVHeads: 4, Group: 4, HeadDim: 128}
	var seed uint64
	cmd := &cobra.Command{
		Use:   "shape [flags]",
		Short: "How the made contexts of 'million' compare with real models'",
		Long:  shapeHelp,
		Example: `  kvbench shape --dump 'smollm2/*.npz'
  kvbench shape --tokens 131072 --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			say := sayer(cmd, "shape")
			var columns []shapeColumn
			for _, pattern := range dumps {
				c, err := realShapes(pattern, scale, say)
				if err != nil {
					return err
				}
				columns = append(columns, *c)
			}
			made, err := madeShapes(g, seed, say)
			if err != nil {
				return err
			}
			columns = append(columns, *made)
			if asJSON {
				return printJSON(cmd.OutOrStdout(), columns)
			}
			return printShapes(cmd.OutOrStdout(), columns)
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&dumps, "dump", nil, "pattern of dumps of one model (may be given again)")
	f.Float64Var(&scale, "scale", 0, "factor on the dumps' scores (default: 1/sqrt(head dimension))")
	f.IntVar(&g.Tokens, "tokens", g.Tokens, "tokens of the made context")
	f.IntVar(&g.Layers, "layers", g.Layers, "layers of the made model, all of which are measured")
	f.IntVar(&g.HeadDim, "head-dim", g.HeadDim, "head dimension of the made model")
	f.Uint64Var(&seed, "seed", 2, "of the made model")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// shapeColumn is what was measured of one model.
type shapeColumn struct {
	Of     string
	Shapes []synth.Shape
}

// measuredSteps is how many of the last positions are asked.
const measuredSteps = 128

func realShapes(pattern string, scale float64, say func(string, ...any)) (*shapeColumn, error) {
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		return nil, fmt.Errorf("--dump %s: no such file", pattern)
	}
	out := &shapeColumn{Of: filepath.Base(filepath.Dir(paths[0]))}
	for _, path := range paths {
		d, err := quality.ReadDump(path, scale)
		if err != nil {
			return nil, err
		}
		say("%s: %d tokens, %d KV heads", path, d.Tokens, d.Heads)
		for head := range d.Heads {
			s, err := synth.Measure(rowsOf(d, head))
			if err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
			out.Shapes = append(out.Shapes, s...)
		}
	}
	return out, nil
}

// rowsOf returns one KV head of a dump.
func rowsOf(d *quality.Dump, head int) *synth.Rows {
	r := &synth.Rows{D: d.Dim, Group: d.Group}
	for t := range d.Tokens {
		at := (t*d.Heads + head) * d.Dim
		r.K, r.V = append(r.K, d.K[at:at+d.Dim]...), append(r.V, d.V[at:at+d.Dim]...)
	}
	for i := max(0, d.Queries-measuredSteps); i < d.Queries; i++ {
		at := (i*d.Heads + head) * d.Group * d.Dim
		r.Q = append(r.Q, d.Q[at:at+d.Group*d.Dim]...)
	}
	return r
}

func madeShapes(g synth.Geometry, seed uint64, say func(string, ...any)) (*shapeColumn, error) {
	m, err := synth.New(g, seed)
	if err != nil {
		return nil, err
	}
	out := &shapeColumn{Of: "made"}
	for layer := range g.Layers {
		say("made layer %d: %d tokens, %d KV heads", layer, g.Tokens, g.KVHeads)
		for head := range g.KVHeads {
			s, err := synth.Measure(m.Head(layer, head, measuredSteps))
			if err != nil {
				return nil, err
			}
			out.Shapes = append(out.Shapes, s...)
		}
	}
	return out, nil
}

// shapeRows are the figures that are printed.
var shapeRows = []struct {
	name string
	of   func(s *synth.Shape) float64
}{
	{"attention to the first 16 tokens", func(s *synth.Shape) float64 { return s.Sink }},
	{"attention to the newest 256", func(s *synth.Shape) float64 { return s.Recent }},
	{"attention to the body", func(s *synth.Shape) float64 { return s.Body }},
	{"body: share of tokens with half of that", func(s *synth.Shape) float64 { return s.Half }},
	{"body: share of tokens with .9 of that", func(s *synth.Shape) float64 { return s.Most }},
	{"body: share of the strongest token", func(s *synth.Shape) float64 { return s.Top }},
	{"body: spread of scores, nats", func(s *synth.Shape) float64 { return s.Spread }},
	{"body: highest score above the mean, nats", func(s *synth.Shape) float64 { return s.Peak }},
	{"strongest 2 % again after 1 step", func(s *synth.Shape) float64 { return s.Again[0] }},
	{"in the last 16 steps", func(s *synth.Shape) float64 { return s.Again[1] }},
	{"in the last 64 steps", func(s *synth.Shape) float64 { return s.Again[2] }},
	{"directions in which keys vary", func(s *synth.Shape) float64 { return s.Directions }},
	{"sd of the log of channels' spreads", func(s *synth.Shape) float64 { return s.Channels }},
	{"largest mean of a channel, in mean spreads", func(s *synth.Shape) float64 { return s.Constant }},
	{"variance of values that follows keys", func(s *synth.Shape) float64 { return s.Following }},
	{"mean value, in spreads", func(s *synth.Shape) float64 { return s.CommonValue }},
}

func printShapes(w io.Writer, columns []shapeColumn) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprint(t, "figure")
	for _, c := range columns {
		fmt.Fprintf(t, "\t%s (%d heads)", c.Of, len(c.Shapes))
	}
	fmt.Fprintln(t)
	for _, row := range shapeRows {
		fmt.Fprint(t, row.name)
		for _, c := range columns {
			x := make([]float64, len(c.Shapes))
			for i := range c.Shapes {
				x[i] = row.of(&c.Shapes[i])
			}
			slices.Sort(x)
			fmt.Fprintf(t, "\t%.3g (%.3g-%.3g)", x[len(x)/2], x[len(x)/10], x[len(x)-1-len(x)/10])
		}
		fmt.Fprintln(t)
	}
	return t.Flush()
}
