// Package flip damages a data folder, one byte at a time, and looks whether
// anybody is told something wrong.
//
// Its test makes a small folder with sequences of every profile, of full and
// sliding layers: sealed spans, forks, labels, open tails with a truncation in
// their log. Then, for every flip, it restores the folder, changes one byte of
// one file by a random pattern of bits, opens the folder, and asks everything
// that can be asked: answers in every layer, exact and sparse, the rows, the
// description. Each must be, bit for bit, what the undamaged folder says, or an
// error; or the folder must be refused; or a tail may be shorter, and what is
// there is right.
//
// An offline check of the folder comes first. It must have found damage where the
// daemon then refuses the folder or an answer, and at least a note of every other
// flip but of bytes that nobody uses.
//
// Every file of the folder that has bytes (LOCK has none) is hit, small ones more often than their size
// deserves; in extents it is mostly blocks that hold something. One half of the
// flips hits a folder that was closed, the other one that was killed, where the
// catalogue's newest changes lie in its write-ahead log.
//
//	make flip                     2,000 flips
//	go test ./bench/flip -v -args -flips=500 -seed=7
package flip
