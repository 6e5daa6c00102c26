package testenv

import "testing"

func TestAKernelReleaseIsComparedByNumber(t *testing.T) {
	for _, tt := range []struct {
		name         string
		release      string
		major, minor int
		want         bool
		wantErr      bool
	}{
		{name: "the same version is enough", release: "6.7.0", major: 6, minor: 7, want: true},
		{name: "ten is more than nine", release: "6.10.3-cloud-amd64", major: 6, minor: 9, want: true},
		{name: "an older minor is not enough", release: "6.1.0-47-amd64", major: 6, minor: 7},
		{name: "a newer major is enough whatever its minor", release: "7.0-rc1", major: 6, minor: 7, want: true},
		{name: "an older major is not enough whatever its minor", release: "5.15.0", major: 6, minor: 7},
		{name: "a release without numbers is an error", release: "next", major: 6, minor: 7, wantErr: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := atLeast(tt.release, tt.major, tt.minor)
			if (err != nil) != tt.wantErr {
				t.Fatalf("error %v, want one: %v", err, tt.wantErr)
			}
			if got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}
