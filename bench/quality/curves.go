package quality

import (
	"bytes"
	"fmt"
	"html"
	"math"
)

// A panel of Curves, in SVG units.
const (
	panelWidth, panelHeight = 380, 300
	panelLeft, panelTop     = 60, 40
	panelGap                = 90
)

var colours = []string{"#1b6ca8", "#444444", "#c0392b", "#8e44ad", "#27ae60", "#d68910", "#16a085", "#7f8c8d"}

// Curves draws, as SVG, what each method makes of the bytes it reads: mean
// output error, and the share of strong tokens left unread, both on log scales
// over the share of the sealed body's 4-bit bytes.
func Curves(results []Result) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n",
		2*panelWidth+panelGap+panelLeft+150, panelHeight+panelTop+60)
	b.WriteString(`<rect width="100%" height="100%" fill="white"/>` + "\n")
	panel(&b, 0, "output error, mean", results, func(r Result) float64 { return r.Error.Mean }, .003, 1)
	panel(&b, panelWidth+panelGap, "strong tokens (> 10 %) unread", results, func(r Result) float64 { return r.Strong10.Share() }, .001, 1)
	x := 2*panelWidth + panelGap + panelLeft + 15
	for i, name := range names(results) {
		y := panelTop + 20 + 18*i
		fmt.Fprintf(&b, `<line x1="%d" y1="%d" x2="%d" y2="%d" stroke="%s" stroke-width="2"/><text x="%d" y="%d">%s</text>`+"\n",
			x, y, x+20, y, colours[i%len(colours)], x+26, y+4, html.EscapeString(name))
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

func names(results []Result) (out []string) {
	seen := make(map[string]bool)
	for _, r := range results {
		if !seen[r.Method] {
			seen[r.Method] = true
			out = append(out, r.Method)
		}
	}
	return out
}

// panel draws one figure; values below least are drawn at least.
func panel(b *bytes.Buffer, left int, title string, results []Result, value func(Result) float64, least, most float64) {
	const xLeast, xMost = .03, 1.2
	x := func(v float64) float64 {
		return float64(left+panelLeft) + panelWidth*math.Log(max(v, xLeast)/xLeast)/math.Log(xMost/xLeast)
	}
	y := func(v float64) float64 {
		return panelTop + panelHeight*(1-math.Log(min(max(v, least), most)/least)/math.Log(most/least))
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" font-weight="bold">%s</text>`+"\n", left+panelLeft, panelTop-15, html.EscapeString(title))
	for _, v := range []float64{.05, .1, .2, .5, 1} {
		fmt.Fprintf(b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#dddddd"/><text x="%.1f" y="%d" text-anchor="middle">%g</text>`+"\n",
			x(v), panelTop, x(v), panelTop+panelHeight, x(v), panelTop+panelHeight+18, v)
	}
	for _, v := range []float64{.001, .003, .01, .03, .1, .3, 1} {
		if v >= least {
			fmt.Fprintf(b, `<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="#dddddd"/><text x="%d" y="%.1f" text-anchor="end">%g</text>`+"\n",
				left+panelLeft, y(v), left+panelLeft+panelWidth, y(v), left+panelLeft-6, y(v)+4, v)
		}
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="middle">bytes read, of all at 4 bits</text>`+"\n", left+panelLeft+panelWidth/2, panelTop+panelHeight+38)
	for i, name := range names(results) {
		var points bytes.Buffer
		for _, r := range results {
			if r.Method == name {
				fmt.Fprintf(&points, "%.1f,%.1f ", x(r.RAM), y(value(r)))
				fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>`+"\n", x(r.RAM), y(value(r)), colours[i%len(colours)])
			}
		}
		fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", bytes.TrimSpace(points.Bytes()), colours[i%len(colours)])
	}
}
