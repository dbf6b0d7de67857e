package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/store"
	"kvtier/tiers/taillog"
)

// listLogs finds the logs and how long they are.
func (c *checker) listLogs() {
	names, err := c.FS().List(filepath.Join(c.dir, tailsDir))
	if errors.Is(err, fs.ErrNotExist) {
		return // each sequence's log is missing then
	}
	if err != nil {
		c.find(store.Finding{Verdict: store.Unread, File: tailsDir, Offset: store.Nowhere, What: err.Error(), Advice: store.AdviseReading})
	}
	for _, name := range names {
		if !strings.HasSuffix(name, logSuffix) {
			c.stray(filepath.Join(tailsDir, name), "it is no log: nobody reads it", "nothing; it may be removed")
			continue
		}
		size, err := fileSize(c.FS(), filepath.Join(c.dir, tailsDir, name))
		if err != nil {
			c.find(store.Finding{Verdict: store.VerdictOf(err), File: filepath.Join(tailsDir, name), Offset: store.Nowhere, What: err.Error(), Advice: store.AdviseReading})
		}
		c.logs[name] = size
	}
}

func fileSize(fsys files.FS, path string) (int64, error) {
	f, err := fsys.Open(path, files.Read)
	if err != nil {
		return 0, err
	}
	size, err := f.Size()
	return size, errors.Join(err, f.Close())
}

// checkTails reads every sequence's log, and looks for logs that are no sequence's.
func (c *checker) checkTails(ctx context.Context) error {
	named := map[string]bool{}
	for _, s := range c.sequences {
		name := logName(s.ID, s.Gen)
		named[name+logSuffix] = true
		size, there := c.logs[name+logSuffix]
		file := filepath.Join(tailsDir, name+logSuffix)
		switch {
		case !there:
			c.find(store.Finding{Verdict: store.Damage, File: file, Offset: store.Nowhere,
				What:   fmt.Sprintf("the log of the open tail is missing: tokens from %d on are lost", s.end),
				Advice: fmt.Sprintf("restore the file; or start the daemon and append the tokens from %d on again", s.end)}, s.affected(AllLayers, s.end, 0))
		case s.whole: // else nobody knows what its records should be
			if err := c.checkTail(ctx, s, file, name, size); err != nil {
				return err
			}
		default:
			c.find(store.Finding{Verdict: store.Unread, File: file, Offset: store.Nowhere, What: "it was not read: the catalogue does not say what it should hold",
				Advice: "see what is said of the catalogue"}, s.affected(AllLayers, s.end, 0))
		}
	}
	if !c.Whole {
		return nil // their sequences' records may be among those that are lost
	}
	for _, name := range slices.Sorted(maps.Keys(c.logs)) {
		if !named[name] {
			c.report.StrayBytes += c.logs[name]
			c.stray(filepath.Join(tailsDir, name), fmt.Sprintf("a log that is no sequence's, as a crash leaves it: %d bytes", c.logs[name]),
				"nothing: the daemon's next start removes it")
		}
	}
	return nil
}

// checkTail reads a log as recovery does, but for the rows, which it does not keep.
func (c *checker) checkTail(ctx context.Context, s *checkedSequence, file, name string, size int64) error {
	tail, read := newTailReader(s.spec, s.end, s.logPlace), int64(0)
	lost := lostRecords{keep: allExact}
	good, now, err := taillog.Scan(c.FS(), filepath.Join(c.dir, file), name, taillog.Reader{
		Record: func(k taillog.Kind, body []byte) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			if _, err := tail.next(k, body); err != nil {
				return err
			}
			read += int64(len(body))
			c.advance(int64(len(body)))
			return nil
		},
		Behind: lost.note,
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	c.advance(size - read)
	kept := min(max(tail.at, s.end), max(lost.keep, s.end)) // what the daemon will have
	f := store.Finding{Verdict: store.Damage, File: file, Offset: good}
	switch {
	case errors.Is(err, tiers.ErrCorrupt), errors.Is(err, tiers.ErrVersion):
		kept = s.end
		f.What = fmt.Sprintf("the record is whole and does not fit: %v", err)
		f.Advice = fmt.Sprintf("move the file away, or the daemon does not start; then append the tokens from %d on again", kept)
	case err != nil:
		f.Verdict, f.What, f.Advice = store.Unread, err.Error(), store.AdviseReading
	case lost.damaged:
		f.What = fmt.Sprintf("a record that was safe from power cuts is damaged: tokens from %d on are lost", kept)
		f.Advice = fmt.Sprintf("start the daemon and append the tokens from %d on again", kept)
	case tail.textless != nil:
		f.Offset = store.Nowhere
		f.What = fmt.Sprintf("texts cannot be read: %v", tail.textless)
		f.Advice = "nothing that stored answers need is lost; append the tokens again in a new sequence if their texts matter"
	case good < now:
		f.Verdict = store.Note
		f.What = fmt.Sprintf("the last %d bytes are no whole records, as a crash leaves them: there are tokens up to %d", now-good, kept)
		f.Advice = "nothing: the daemon's next start cuts them off. If more tokens had been acknowledged as power-safe, the disk lost them"
	default:
		return nil
	}
	c.find(f, s.affected(AllLayers, kept, 0))
	return nil
}
