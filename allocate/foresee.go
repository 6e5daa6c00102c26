package allocate

import (
	"fmt"
	"time"

	"github.com/tranship/tranship/predict"
)

// Forecasts of one load; a *predict.Forecaster with the Horizons.
type Forecasts interface {
	Forecast(h time.Duration, t predict.Target) (predict.Quantiles, error)
}

var _ Forecasts = (*predict.Forecaster)(nil)

// Outlook is what one load will be.
type Outlook struct {
	Spans [Spans]Curve
	Peak  Curve // the most of it at any time of the horizon
}

// SeenFor: a host that was overloaded for so long is so in the nearest span, whatever
// is forecast: forecasts follow a load that jumps with some delay.
const SeenFor = time.Minute

// Foresee asks for what a plan is made with. Production and the simulator plan
// with what it answers.
func Foresee(f Forecasts) (o Outlook, err error) {
	var q predict.Quantiles
	for i, s := range horizon {
		if q, err = f.Forecast(s.at, predict.Value); err != nil {
			return Outlook{}, fmt.Errorf("forecast for %v ahead: %w", s.at, err)
		}
		o.Spans[i] = CurveOf(q)
	}
	all := horizon[Spans-1].until
	if q, err = f.Forecast(all, predict.Peak); err != nil {
		return Outlook{}, fmt.Errorf("forecast of the peak within %v: %w", all, err)
	}
	o.Peak = CurveOf(q)
	return o, nil
}
