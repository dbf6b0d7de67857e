package server

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"path/filepath"
	"slices"

	"kvtier/tiers"
	"kvtier/tiers/files"
)

// What audits taught outlives the daemon in one small file: by model, layer and
// kind the newest ratios. It is written when the daemon stops and now and then
// before; a crash loses the audits since.
const (
	calibrationFile = "calibration.json"
	savedRatios     = 100
	saveEvery       = 1024 // audits
)

type savedModel struct {
	Fingerprint []byte
	Profile     tiers.Profile
	Cells       []savedCell
	Heads       []savedHead
}

type savedCell struct {
	Layer int
	Kind  string
	// Estimate is the kind's (kind.estimate) when the ratios were measured: those to another estimate say nothing.
	Estimate int       `json:",omitempty"`
	Ratios   []float32 // from the oldest to the newest
}

type savedHead struct {
	Layer, Head, Audits int
	Log                 float64
}

// save writes what is known; models without an audit are left out.
func (c *calibration) save(fsys files.FS, dir string) error {
	b, err := json.Marshal(c.saved())
	if err != nil {
		return err
	}
	return files.WriteFile(fsys, filepath.Join(dir, calibrationFile), binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(b)))
}

func (c *calibration) saved() []savedModel {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := []savedModel{}
	for key, m := range c.mu.models {
		s := savedModel{Fingerprint: []byte(key.fingerprint), Profile: key.profile}
		for at, x := range m.cells {
			var ratios []float32
			for _, a := range x.newest(savedRatios) {
				ratios = append(ratios, a.ratio)
			}
			if len(ratios) > 0 {
				s.Cells = append(s.Cells, savedCell{at[0], kind(at[1]).String(), kind(at[1]).estimate(), ratios})
			}
		}
		for at, h := range m.heads {
			s.Heads = append(s.Heads, savedHead{at[0], at[1], h.n, h.log})
		}
		if len(s.Cells) > 0 {
			out = append(out, s)
		}
	}
	return out
}

// load takes in what save wrote. Whether stated errors held is not carried
// over: that counts from the daemon's start.
func (c *calibration) load(fsys files.FS, dir string) error {
	models, err := readCalibration(fsys, filepath.Join(dir, calibrationFile))
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range models {
		m := c.modelLocked(modelKey{string(s.Fingerprint), s.Profile})
		for _, x := range s.Cells {
			k := slices.Index(kindNames[:], x.Kind)
			if k < 0 || x.Estimate != kind(k).estimate() {
				continue // of a build with other kinds, or estimates
			}
			cell := &cell{}
			for _, r := range x.Ratios {
				cell.add(audited{ratio: r}, cellKept)
				m.pools[k].add(r, poolKept)
			}
			m.cells[[2]int{x.Layer, k}] = cell
		}
		for _, h := range s.Heads {
			m.heads[[2]int{h.Layer, h.Head}] = &headBias{h.Log, h.Audits}
		}
	}
	return nil
}

// readCalibration reads what save wrote; nothing if it never did.
func readCalibration(fsys files.FS, path string) (models []savedModel, err error) {
	b, err := files.ReadFile(fsys, path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	n := len(b) - 4
	if n < 0 || crc32.ChecksumIEEE(b[:n]) != binary.LittleEndian.Uint32(b[n:]) {
		return nil, fmt.Errorf("%s: %w", path, tiers.ErrCorrupt)
	}
	if err := json.Unmarshal(b[:n], &models); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path, tiers.ErrCorrupt, err)
	}
	return models, nil
}

var kindNames = func() (out [numKinds]string) {
	for k := range out {
		out[k] = kind(k).String()
	}
	return out
}()
