package image

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/regfile"
	"google.golang.org/protobuf/encoding/protowire"
)

// RegFile is a regular file (or directory) that a task holds open or maps, or
// that CRIU keeps for another's sake.
type RegFile struct {
	ID uint32
	// Name is the path in the shard's mount namespace.
	Name     string
	Flags    uint32 // of open(2)
	Pos      uint64
	MountID  int32 // -1 unknown
	Size     uint64
	HasSize  bool
	Mode     uint32
	External bool
}

// LinkRemap says that the file is a name that CRIU gave to an open file whose
// own name was removed but which has others: link_remap.<id>, beside the old
// name. A restore removes it, anything else leaves it behind.
func (f RegFile) LinkRemap() bool {
	digits, ok := strings.CutPrefix(path.Base(f.Name), "link_remap.")
	return ok && digits != "" && strings.Trim(digits, "0123456789") == ""
}

// regType is the one fd_types value that is read (images/fdinfo.proto).
const regType = 1

// ReadRegFiles reads the regular files of files.img and passes over all else:
// types that go-criu does not know yet must not make the rest unreadable.
func ReadRegFiles(r io.Reader) ([]RegFile, error) {
	img, err := openImage(bufio.NewReader(r), filesMagic)
	if err != nil {
		return nil, fmt.Errorf("files: %w", err)
	}
	var files []RegFile
	err = img.each(func(raw []byte) error {
		var kind, id uint64
		var reg []byte
		err := fields(raw, func(f field) error {
			switch f.num {
			case 1:
				kind = f.value
			case 2:
				id = f.value
			case 3:
				reg = f.bytes
			}
			return nil
		}, 1, 2)
		if err != nil || kind != regType {
			return err
		}
		if reg == nil {
			return malformed("file %d without what it is", id)
		}
		var m regfile.RegFileEntry
		if err := unmarshal(reg, &m); err != nil {
			return err
		}
		if uint64(m.GetId()) != id {
			return malformed("file %d says it is %d", id, m.GetId())
		}
		files = append(files, RegFile{
			ID: m.GetId(), Name: m.GetName(), Flags: m.GetFlags(), Pos: m.GetPos(), MountID: m.GetMntId(),
			Size: m.GetSize(), HasSize: m.Size != nil, Mode: m.GetMode(), External: m.GetExt(),
		})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("files: %w", err)
	}
	return files, nil
}

// fileOf takes the embedded message num out of an entry of files.img (file_entry
// of images/fdinfo.proto) that is of a type; nil for entries of others.
func fileOf(entry []byte, fdType uint64, num protowire.Number) (file []byte, err error) {
	var kind uint64
	err = fields(entry, func(f field) error {
		switch f.num {
		case 1:
			kind = f.value
		case num:
			file = f.bytes
		}
		return nil
	}, 1, 2)
	if err != nil || kind != fdType {
		return nil, err
	}
	return file, nil
}
