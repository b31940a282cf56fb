//go:build faultpoints

package embedded

import "embed"

// The keeper of such a build has fault points too.
const dir = "files-faultpoints"

//go:embed files-faultpoints
var files embed.FS
