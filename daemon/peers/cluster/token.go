package cluster

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
)

// tokenPrefix lets a person, and a scanner for leaked secrets, recognise one.
const tokenPrefix = "tranship-join-1-"

const (
	tokenIDLen = 8
	secretLen  = 32
	// tokenLen: ID, secret, the CA's hash, and a checksum against lost letters.
	tokenLen = tokenIDLen + secretLen + sha256.Size + 4
)

// Token is the right to join once. Its secret never travels: the joining host
// proves that it has it, and so does the host that it joins.
type Token struct {
	ID     [tokenIDLen]byte
	Secret [secretLen]byte
	CAHash [sha256.Size]byte
}

// ErrToken says that a text is no token, or not all of it.
var ErrToken = errors.New("not a whole join token")

func newToken(caHash [sha256.Size]byte) Token {
	t := Token{CAHash: caHash}
	rand.Read(t.ID[:]) // never fails
	rand.Read(t.Secret[:])
	return t
}

// String is the token as people copy it.
func (t Token) String() string {
	raw := make([]byte, 0, tokenLen)
	raw = append(append(append(raw, t.ID[:]...), t.Secret[:]...), t.CAHash[:]...)
	raw = binary.BigEndian.AppendUint32(raw, crc32.ChecksumIEEE(raw))
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(raw)
}

// ParseToken reads what String wrote; white space around it is allowed.
func ParseToken(s string) (Token, error) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(s), tokenPrefix)
	if !ok {
		return Token{}, fmt.Errorf("%w: it does not begin with %s", ErrToken, tokenPrefix)
	}
	// Strict: a second spelling of the same token would be a second token to people.
	raw, err := base64.RawURLEncoding.Strict().DecodeString(rest)
	if err != nil || len(raw) != tokenLen {
		return Token{}, fmt.Errorf("%w: copy all of it", ErrToken)
	}
	body := raw[:tokenLen-4]
	if crc32.ChecksumIEEE(body) != binary.BigEndian.Uint32(raw[tokenLen-4:]) {
		return Token{}, fmt.Errorf("%w: its checksum is wrong", ErrToken)
	}
	var t Token
	copy(t.ID[:], body)
	copy(t.Secret[:], body[tokenIDLen:])
	copy(t.CAHash[:], body[tokenIDLen+secretLen:])
	return t, nil
}

// What a proof is for; one is never good for the other.
const (
	proofOfRequest = "join request"
	proofOfAnswer  = "join answer"
)

// proof shows that its maker has the secret, for one body on one TLS connection
// alone: channel is that connection's exported key (RFC 9266), so what was
// overheard or relayed is of no use on another.
func proof(secret []byte, purpose string, channel, body []byte) []byte {
	mac := hmac.New(sha256.New, secret)
	sum := sha256.Sum256(body)
	mac.Write([]byte("tranship " + purpose + "\x00"))
	mac.Write(channel)
	mac.Write(sum[:])
	return mac.Sum(nil)
}
