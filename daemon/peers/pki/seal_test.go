package pki

import (
	"crypto/tls"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestASealIsOfOneHostOneKindAndOneStatement(t *testing.T) {
	ca, other := newCA(t), newCA(t)
	pair := func(ca *CA, node string, ttl time.Duration) *tls.Certificate {
		t.Helper()
		cert, key, err := ca.Issue(node, ttl)
		if err != nil {
			t.Fatal(err)
		}
		p, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return &p
	}
	seal := func(p *tls.Certificate) Seal {
		t.Helper()
		s, err := MakeSeal(p, "workload", []byte("web"))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	one, two := pair(ca, "host-1", time.Hour), pair(ca, "host-2", time.Hour)
	good := seal(one)
	if host, err := good.Open(ca.Cert(), "workload", []byte("web")); err != nil || host.Name != "host-1" || CheckID(host.ID) != nil {
		t.Errorf("%v %v", host, err)
	}
	// Its certificate ends long before what it sealed.
	short := seal(pair(ca, "host-1", time.Nanosecond))
	if host, err := short.Open(ca.Cert(), "workload", []byte("web")); err != nil || host.Name != "host-1" {
		t.Errorf("after its certificate ended: %v %v", host, err)
	}
	for name, c := range map[string]struct {
		seal               Seal
		purpose, statement string
	}{
		"another statement":                    {good, "workload", "cache"},
		"another kind":                         {good, "membership", "web"},
		"no seal":                              {Seal{}, "workload", "web"},
		"another cluster's host of that name":  {seal(pair(other, "host-1", time.Hour)), "workload", "web"},
		"one host's signature, another's name": {Seal{Cert: two.Certificate[0], Sig: good.Sig}, "workload", "web"},
		"the CA's certificate as a host's":     {Seal{Cert: ca.Cert().Raw, Sig: good.Sig}, "workload", "web"},
		"a signature that is cut":              {Seal{Cert: good.Cert, Sig: good.Sig[:len(good.Sig)-1]}, "workload", "web"},
		"what is no certificate":               {Seal{Cert: []byte(strings.Repeat("x", 400)), Sig: good.Sig}, "workload", "web"},
	} {
		if host, err := c.seal.Open(ca.Cert(), c.purpose, []byte(c.statement)); !errors.Is(err, ErrNotSealed) {
			t.Errorf("%s: %v %v", name, host, err)
		}
	}
}
