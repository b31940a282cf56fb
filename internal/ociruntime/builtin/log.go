package builtin

import (
	"context"
	"io"
	"log/slog"

	"github.com/sirupsen/logrus"
)

// forwardLog makes libcontainer's messages messages of log. Its errors come
// back as errors too, so that those who log at the edge say them there.
func forwardLog(log *slog.Logger) {
	std := logrus.StandardLogger()
	std.SetOutput(io.Discard)
	std.SetLevel(logrus.WarnLevel)
	hooks := make(logrus.LevelHooks)
	hooks.Add(forwarder{log})
	std.ReplaceHooks(hooks)
}

type forwarder struct{ log *slog.Logger }

func (forwarder) Levels() []logrus.Level { return logrus.AllLevels }

func (f forwarder) Fire(e *logrus.Entry) error {
	args := []any{"from", "libcontainer"}
	for key, value := range e.Data {
		args = append(args, key, value)
	}
	f.log.Log(context.Background(), slog.LevelWarn, e.Message, args...)
	return nil
}
