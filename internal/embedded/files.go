//go:build !faultpoints

package embedded

import "embed"

const dir = "files"

//go:embed files
var files embed.FS
