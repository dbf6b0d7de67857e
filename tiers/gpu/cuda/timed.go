package cuda

import (
	"errors"
	"time"
)

// Timed returns how long the device takes for what do issues in a stream, by its own clock. It waits for it.
func (c *Context) Timed(s Stream, do func() error) (d time.Duration, err error) {
	begin, err := c.NewEvent(true)
	if err != nil {
		return 0, err
	}
	end, err := c.NewEvent(true)
	if err != nil {
		return 0, errors.Join(err, begin.Destroy())
	}
	if err = errors.Join(begin.Record(s), do(), end.Record(s), end.Synchronize()); err == nil {
		d, err = Elapsed(begin, end)
	}
	return d, errors.Join(err, begin.Destroy(), end.Destroy())
}
