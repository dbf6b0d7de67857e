package kernels

const (
	// CurvePoints is how many points of a curve are given, CurveSteps how many of
	// them to each unit of x.
	CurvePoints = 225
	CurveSteps  = 4
)

// CurveRow holds the values of a curve at its points.
type CurveRow = [CurvePoints]float32

// Curve is a function that is linear between its points, the first of which is
// at From. There and below, and where x is no number, it is 0; from the last
// but one on it is constant.
type Curve struct {
	Below, Above *CurveRow // two neighbours in a family of curves
	Part         float32   // how far it lies from Below to Above
	From         float32
}

// Curves writes to dst [rows][16] what each row's curve is at its 16 x, a row of
// which begins every stride elements, and to sums [rows][2] their sum and the
// sum of their square roots.
func Curves(dst, sums, x []float32, stride int, c []Curve) {
	rows := len(c)
	must(len(dst) >= rows*LineTokens && len(sums) >= 2*rows, "dst or sums is too short")
	mustHold(len(x), rows, stride, LineTokens, "x is too short")
	for i := range c {
		must(c[i].Below != nil && c[i].Above != nil, "a curve has no points")
	}
	if rows > 0 {
		curves(dst, sums, x, stride, c)
	}
}
