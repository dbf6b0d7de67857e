// Package sparse answers queries over sealed segments. It reads in the order
// of relevance: page means, the first bits of keys in promising pages, then
// more bits and values, wherever they take most error away for their bytes.
// What it does not read it estimates from means, and it says how
// good the answer is.
//
// Keys and values may be late (Query.Hasty). Their tokens are then known by
// what was read before: a page whose first bits are late by its means, as if it
// had not been chosen; a leaf by coarser bits; a token by its key and its page's
// mean value. Means are waited for: without them nothing can be estimated.
//
// Values are stored rotated, so partials are summed in rotated space and
// rotated back once an answer.
package sparse

import (
	"context"

	"kvtier/attention"
	"kvtier/tiers"
)

// Reader pins pieces wherever they lie. Every pin it returns is held, and has
// every range, but for those of a Query's Hasty that are late: these are nil.
type Reader interface {
	Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, tiers.Moved, error)
}

// Segment is a sealed segment as a sequence sees it.
type Segment struct {
	Header *tiers.Header
	// Limit is how many of its tokens exist for the query; less than
	// Header.Tokens in a fork. Such a segment is read whole: its leaves are cut.
	Limit int
	// Low says that bits 5 to 8 are stored.
	Low bool
}

// Cut says whether some of the segment's tokens do not exist for the query.
func (s Segment) Cut() bool { return s.Limit < s.Header.Tokens }

// StoredError is the error of what is stored of a head against what was
// appended: the codec's, measured at sealing; a sixteenth of it if 4 more bits of
// keys and values are there; none of lossless rows.
func (s Segment) StoredError(head int) float32 {
	switch e := s.Header.Heads[head].CodecError; {
	case s.Header.Profile == tiers.ProfileExact:
		return 0
	case s.Low:
		return e / 16
	default:
		return e
	}
}

// Query is what one KV head's group asks.
type Query struct {
	Head    int
	Q       []float32 // [rows][d], scaled; rows that are answered together
	Softcap float32
	// Hasty reads keys and values where they are read in part, and may leave out what does not come in time;
	// nil: the reader that reads everything else does that, too.
	Hasty Reader
	// Partials [rows] hold what was attended before, the exact zone; results are merged into them.
	Partials []attention.Partial
}

// Budget says how much may be read.
type Budget struct {
	// All reads every stored token: with the profile exact its lossless rows,
	// else all bits that are stored.
	All bool
	// Share of the bytes that reading all sealed tokens at 4 bits would take, in (0, 1].
	Share float32
	// ByPage has pages be read whole, chosen by their means and by the first bits of their keys: for the same bytes the answer errs more, for
	// the same time less.
	ByPage bool
}

// Account is what an answer cost and how good it is believed to be.
type Account struct {
	Scanned, Read, Estimated int64 // tokens
	// Late counts tokens that are known less well than was asked for, because a read was late, and LateBytes what was
	// asked for and did not come.
	Late, LateBytes int64
	Moved           tiers.Moved
	Full            int64 // bytes of all sealed tokens at 4 bits
	// Error is the estimated relative error, mean over rows, without the codec's.
	Error float32
	// Codec is the stored error (Segment.StoredError), mean over segments.
	Codec                        float32
	NsScore, NsScan, NsFetch     int64
	Pages, Leaves                int64 // scored
	PagesTotal, Scans, Refined   int64 // pages there are; leaves scanned and refined
	errorRows, codecSum, codecNo float64
}

// Add sums up two accounts.
func (a *Account) Add(b Account) {
	a.Scanned, a.Read, a.Estimated = a.Scanned+b.Scanned, a.Read+b.Read, a.Estimated+b.Estimated
	a.Late, a.LateBytes = a.Late+b.Late, a.LateBytes+b.LateBytes
	a.Moved.Add(b.Moved)
	a.Full += b.Full
	rows := a.errorRows + b.errorRows
	if rows > 0 {
		a.Error = float32((float64(a.Error)*a.errorRows + float64(b.Error)*b.errorRows) / rows)
	}
	a.errorRows = rows
	a.codecSum, a.codecNo = a.codecSum+b.codecSum, a.codecNo+b.codecNo
	if a.codecNo > 0 {
		a.Codec = float32(a.codecSum / a.codecNo)
	}
	a.NsScore, a.NsScan, a.NsFetch = a.NsScore+b.NsScore, a.NsScan+b.NsScan, a.NsFetch+b.NsFetch
	a.Pages, a.Leaves = a.Pages+b.Pages, a.Leaves+b.Leaves
	a.PagesTotal, a.Scans, a.Refined = a.PagesTotal+b.PagesTotal, a.Scans+b.Scans, a.Refined+b.Refined
}

// How says what was done with a token.
type How uint8

// The ways a token can take part in an answer, from worst to best.
const (
	Estimated How = iota // by a mean
	Scanned              // its key was read
	Read                 // key and value were read
)

// Trace records what a query did, for Explain. Either function may be nil.
type Trace struct {
	// Token is told of every token: its segment's index, its place and, by row,
	// the log of its weight, which tokens that are estimated share evenly.
	Token func(row, segment, place int, logWeight float32, how How)
}

// Attend answers q from the sealed segments and merges the answer into
// q.Partials. Segments that are cut, and all if b.All, are read whole. On an
// error the partials are undefined.
func Attend(ctx context.Context, r Reader, segments []Segment, q Query, b Budget, tr *Trace) (Account, error) {
	if tr == nil {
		tr = &Trace{}
	}
	var all, part []int
	for i, s := range segments {
		if b.All || s.Cut() {
			all = append(all, i)
		} else {
			part = append(part, i)
		}
	}
	var acc Account
	for _, s := range segments {
		v := view(s, q.Head)
		acc.Full += int64(v.BytesAt4Bits())
		acc.codecSum += float64(s.StoredError(q.Head))
		acc.codecNo++
	}
	if len(all) > 0 {
		w := newWhole(ctx, r, q, tr)
		for _, i := range all {
			a, err := w.read(i, segments[i])
			if err != nil {
				return acc, err
			}
			acc.Add(a)
		}
		mergeRotated(q.Partials, w.ps, len(q.Q)/len(q.Partials))
	}
	if len(part) > 0 {
		run := newRun(ctx, r, segments, part, q, b, tr)
		answer := run.answer
		if b.ByPage {
			answer = (&byPage{run: run}).answer
		}
		if err := answer(); err != nil {
			return acc, err
		}
		acc.Add(run.acc)
	} else {
		acc.Add(Account{errorRows: float64(len(q.Partials))})
	}
	return acc, nil
}
