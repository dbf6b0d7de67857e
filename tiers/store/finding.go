package store

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	"kvtier/tiers"
)

// Verdict says what a finding means.
type Verdict uint8

const (
	// Damage is what no crash explains and no start of the daemon mends.
	Damage Verdict = iota
	// Unread is what could not be read, so that nobody knows what is there.
	Unread
	// Note is what the daemon's next start mends or does without: what a crash
	// leaves behind.
	Note
)

var verdictNames = [...]string{"damage", "unread", "note"}

func (v Verdict) String() string {
	if int(v) < len(verdictNames) {
		return verdictNames[v]
	}
	return fmt.Sprintf("verdict(%d)", uint8(v))
}

// MarshalText writes the verdict's name.
func (v Verdict) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// Nowhere is the offset of what has no particular place in its file.
const Nowhere = -1

// Finding is one thing that the inspection of a data folder found.
type Finding struct {
	Verdict Verdict  `json:"verdict"`
	File    string   `json:"file"`   // in the data folder
	Offset  int64    `json:"offset"` // in the file, in bytes; Nowhere: of the file as a whole
	What    string   `json:"what"`
	Advice  string   `json:"advice"` // what to do about it
	Segment tiers.ID `json:"-"`      // whose bytes they are; zero: no segment's
}

// VerdictOf tells bytes that are wrong, or missing, from those that the system
// did not give.
func VerdictOf(err error) Verdict {
	if no, ok := errors.AsType[syscall.Errno](err); ok && no != syscall.ENOENT {
		return Unread
	}
	return Damage
}

// text is an error in one line, without advice that the finding gives besides.
func text(err error) string {
	s := strings.ReplaceAll(err.Error(), "<corruption detail carrier>", "") // Pebble's mark
	s = strings.ReplaceAll(s, "; "+whatToDo, "")
	return strings.Join(strings.Fields(s), " ")
}
