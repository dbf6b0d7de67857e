//go:build !race

package ram_test

const raceEnabled = false
