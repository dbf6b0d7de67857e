package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"kvtier/cmd/internal/size"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// print writes m as JSON, or runs table.
func (a *app) print(m proto.Message, table func(w io.Writer)) error {
	if a.format == "json" {
		return a.printMessage(m)
	}
	var b bytes.Buffer
	table(&b)
	_, err := a.out.Write(b.Bytes())
	return err
}

func (a *app) printMessage(m proto.Message) error {
	raw, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return err
	}
	// protojson varies its white space on purpose; scripts and diffs want it stable.
	var b bytes.Buffer
	if err := json.Indent(&b, raw, "", "  "); err != nil {
		return err
	}
	b.WriteByte('\n')
	_, err = a.out.Write(b.Bytes())
	return err
}

// columns writes rows in aligned columns.
func columns(w io.Writer, rows [][]string) {
	var b bytes.Buffer
	tw := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(tw, strings.Join(r, "\t"))
	}
	tw.Flush()
	for line := range strings.Lines(b.String()) {
		fmt.Fprintln(w, strings.TrimRight(line, " \n"))
	}
}

// count writes n with thousands separated: 1,048,576.
func count(n uint64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// percent writes part as a share of whole; a dash if there is no whole.
func percent(part, whole uint64) string {
	if whole == 0 {
		return "-"
	}
	return share(float64(part) / float64(whole))
}

func share(x float64) string { return fmt.Sprintf("%.1f%%", 100*x) }

// used writes bytes held of a limit; no limit shows as a dash.
func used(held, limit uint64) string {
	if limit == 0 {
		return size.Format(held)
	}
	return fmt.Sprintf("%s of %s (%s)", size.Format(held), size.Format(limit), percent(held, limit))
}

// age writes how long ago a Unix time was.
func (a *app) age(unix uint64) string {
	if unix == 0 {
		return "-"
	}
	return duration(a.now().Sub(time.Unix(int64(unix), 0))) + " ago"
}

// duration writes d with one unit, or two for hours and days.
func duration(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", max(0, int(d.Seconds())))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%02dh", int(d.Hours())/24, int(d.Hours())%24)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return printable(s)
}

// printable replaces what would disturb a terminal: names and labels come from other people.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '\uFFFD'
		}
		return r
	}, s)
}

// enumWord is the last part of an enum's name in lower case: PROFILE_BALANCED is balanced.
func enumWord(name, prefix string) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(name, prefix)), "_", " ")
}

func profileWord(p kvtierv1.Profile) string   { return enumWord(p.String(), "PROFILE_") }
func dtypeWord(t kvtierv1.ElementType) string { return enumWord(t.String(), "ELEMENT_TYPE_") }
func modeWord(m kvtierv1.AttendMode) string   { return enumWord(m.String(), "ATTEND_MODE_") }
func spanKindWord(k kvtierv1.SpanKind) string { return enumWord(k.String(), "SPAN_KIND_") }
func spanRange(start, end uint64) string      { return fmt.Sprintf("%d-%d", start, end) }
func nanoseconds(n uint64) string             { return time.Duration(n).Round(time.Microsecond).String() }
func errorText(x float32) string              { return fmt.Sprintf("%.4f", x) }
func heading(w io.Writer, title string)       { fmt.Fprintf(w, "\n%s\n", title) }
func yesNo(b bool) string                     { return map[bool]string{true: "yes", false: "no"}[b] }
