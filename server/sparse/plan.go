package sparse

import (
	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// firstPart and mostPart are the shares of a budget, page means taken off, that
// go to the first plane of keys before anything is known of them, and at most
// (docs/decisions/0004-budget-path.md). What is left goes where it is worth most.
const (
	firstPart = .28
	mostPart  = .45
)

// mapPart is the most of a budget that the map of values may cost; below about
// 4,000 tokens a small budget does better without it.
const mapPart = .1

// What a token unlike all others weighs cannot be told from half a bit of its key if nobody asked for the like before.
// So the first outlierPlanes planes of outliers' keys, 2 bits a channel, are read whatever they promise, if that takes no more than
// outlierPart of a budget. Below that half a bit has to do at first, as for others (docs/decisions/0030-small-budgets.md).
const (
	outlierPlanes = 3
	outlierPart   = .05
)

// closely says whether outliers are looked at closely when share may be read.
func (b *body) closely(share float32) bool { return b.outliers <= outlierPart*float64(share)*b.full }

// MeansShare is what share of the bytes that all tokens have at 4 bits the means of all pages have, which every query reads.
func MeansShare(d int) float32 {
	page := tiers.PageTokens * (compress.ValueScaleBytes + 2*compress.ValueRowBytes(d))
	v := seal.View{D: d, Info: tiers.HeadInfo{Body: tiers.SegmentTokens}}
	return float32(v.PagesBytes()) / float32(v.Pages()*page)
}

// withMap says whether the map of values is read when share may be, and if so
// counts it.
func (b *body) withMap(share float32) bool {
	bytes := lines(attention.ValueMapBytes(b.d))
	if bytes > mapPart*float64(share)*b.full {
		return false
	}
	b.always += bytes
	return true
}

// scannedPages is how many pages are scanned at first, and at most, when share
// of the body's 4-bit bytes may be read.
func (b *body) scannedPages(share float32) (first, most int) {
	always := b.always
	if b.closely(share) && b.pages <= float64(allApart) { // else outliers have to deserve it
		always += b.outliers
	}
	if b.sparing(share) {
		always += meansPart * b.means
	} else {
		always += b.means
	}
	left := max(0, float64(share)*b.full-always)
	pages := func(part float64) int { return int(min(b.pages, max(1, part*left/b.scanOfPage()))) }
	return pages(firstPart), pages(mostPart)
}

// All pages' mean values are read if that takes no more than allMeansPart of a budget, or if not all pages will be told apart,
// whose rest stands by them; else about meansPart of them.
const (
	allMeansPart = .09
	meansPart    = .4
)

// sparing says whether only those mean values are read that are worth it.
func (b *body) sparing(share float32) bool {
	return b.pages <= float64(allApart) && b.means > allMeansPart*float64(share)*b.full
}

// body counts what the segments of a query hold.
type body struct {
	pages, groups float64
	always        float64 // bytes that every query reads
	outliers      float64 // bytes of outliers' first planes
	means         float64 // bytes of pages' mean values
	full          float64 // bytes of everything at 4 bits
	d             int
}

func (b *body) add(v seal.View) {
	b.d = v.D
	b.pages += float64(v.Pages())
	b.groups += float64(v.StepGroups())
	b.full += float64(v.BytesAt4Bits())
	b.always += lines(v.MeanKeys().Len) + lines(compress.KeyOrderBytes(v.D))
	b.means += float64(v.Pages() * v.D)
	keys := compress.KeyPlaneBytes(v.D)
	for _, n := range keys[:outlierPlanes] {
		b.outliers += float64((v.Info.Outliers + tiers.LeafTokens - 1) / tiers.LeafTokens * n)
	}
}

// scanOfPage is what scanning a page takes: the first plane of its keys, and
// its part of the bins that it shares with neighbours, of a group of channels a line at most.
func (b *body) scanOfPage() float64 {
	return float64(leavesOfPage*compress.KeyPlaneBytes(b.d)[0]) + b.groups*float64(tiers.LineSize*compress.KeyPlaneLines(b.d)[0])/b.pages
}

// lines is how many bytes of cache lines n bytes touch on average, if they lie
// at a multiple of n.
func lines(n int) float64 {
	if n == 0 {
		return 0
	}
	align := min(n&-n, tiers.LineSize)
	return float64(n - align + tiers.LineSize)
}
