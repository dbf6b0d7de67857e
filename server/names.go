package server

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io/fs"
	"path/filepath"
	"sync"

	"kvtier/tiers"
	"kvtier/tiers/files"
)

// blockTokens is the granularity of names, and so of prefix matches.
const blockTokens = 64

// noToken stands for a token whose id the caller did not give; it has no name.
const noToken = ^uint64(0)

// name finds a block of 64 tokens and everything before it: names chain.
type name [sha256.Size]byte

// namer makes names for one model and profile.
type namer struct {
	h       hash.Hash
	profile tiers.Profile
	print   []byte
}

func newNamer(key []byte, s *spec, p tiers.Profile) *namer {
	return &namer{h: hmac.New(sha256.New, key), profile: p, print: s.fingerprint}
}

// next returns the name of the block of ids that follows parent. exact says
// that all its K and V came from exact attention.
func (n *namer) next(parent name, ids []uint64, exact bool) (out name) {
	n.h.Reset()
	n.h.Write(parent[:])
	var b [8]byte
	for _, id := range ids {
		binary.LittleEndian.PutUint64(b[:], id)
		n.h.Write(b[:])
	}
	b = [8]byte{byte(n.profile)}
	if exact {
		b[1] = 1
	}
	binary.LittleEndian.PutUint32(b[4:], uint32(len(n.print)))
	n.h.Write(b[:])
	n.h.Write(n.print)
	n.h.Sum(out[:0])
	return out
}

// chain extends names over as many whole blocks as ids has, up to the first
// token without an id. names are the blocks before ids[0].
func (n *namer) chain(names []name, ids []uint64, exactUntil uint64) []name {
	for len(ids) >= blockTokens {
		block := ids[:blockTokens]
		for _, id := range block {
			if id == noToken {
				return names
			}
		}
		var parent name
		if len(names) > 0 {
			parent = names[len(names)-1]
		}
		end := uint64(len(names)+1) * blockTokens
		names = append(names, n.next(parent, block, end <= exactUntil))
		ids = ids[blockTokens:]
	}
	return names
}

// nameIndex finds the sequences that hold a block. Made anew at every start.
type nameIndex struct {
	mu struct {
		sync.RWMutex
		m map[name][]*sequence
	}
}

func newNameIndex() *nameIndex {
	x := &nameIndex{}
	x.mu.m = map[name][]*sequence{}
	return x
}

func (x *nameIndex) add(s *sequence, names []name) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, n := range names {
		x.mu.m[n] = append(x.mu.m[n], s)
	}
}

func (x *nameIndex) remove(s *sequence, names []name) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, n := range names {
		l := x.mu.m[n]
		for i := range l {
			if l[i] == s {
				l = append(l[:i:i], l[i+1:]...)
				break
			}
		}
		if len(l) == 0 {
			delete(x.mu.m, n)
		} else {
			x.mu.m[n] = l
		}
	}
}

// find returns the sequences that hold a block, oldest first.
func (x *nameIndex) find(n name) []*sequence {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.mu.m[n]
}

const tenantKeyBytes = 32

const tenantKeyFile = "tenant.key"

// tenantKey reads the key that names are made with, or makes it. It keeps
// names of one data folder from meaning anything elsewhere.
func tenantKey(fsys files.FS, dir string) ([]byte, error) {
	path := filepath.Join(dir, tenantKeyFile)
	key, err := readTenantKey(fsys, path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key = make([]byte, tenantKeyBytes)
	if _, err := rand.Read(key); err != nil {
		return nil, err
	}
	return key, files.WriteFile(fsys, path, binary.LittleEndian.AppendUint32(key[:tenantKeyBytes:tenantKeyBytes], crc32.ChecksumIEEE(key)))
}

func readTenantKey(fsys files.FS, path string) ([]byte, error) {
	b, err := files.ReadFile(fsys, path)
	if err != nil {
		return nil, fmt.Errorf("tenant key: %w", err)
	}
	if len(b) != tenantKeyBytes+4 || crc32.ChecksumIEEE(b[:tenantKeyBytes]) != binary.LittleEndian.Uint32(b[tenantKeyBytes:]) {
		return nil, fmt.Errorf("%s is damaged: restore it, or remove it (stored prefixes are then still found, under new names): %w", path, tiers.ErrCorrupt)
	}
	return b[:tenantKeyBytes], nil
}
