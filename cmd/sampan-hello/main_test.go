package main

import (
	"net/http/httptest"
	"strings"
	"testing"
)

func TestHello(t *testing.T) {
	w := httptest.NewRecorder()
	hello("pod-7").ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	if w.Code != 200 || !strings.HasPrefix(w.Body.String(), "Hello from pod pod-7.") {
		t.Errorf("%d %q", w.Code, w.Body)
	}
}
