package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/admin"
	"sampan.dev/sampan/internal/embedded"
	"sampan.dev/sampan/internal/hello"
)

func newImageCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "List, pull, load and remove images", Args: cobra.NoArgs}
	cmd.AddCommand(newImageListCommand(), newImagePullCommand(), newImageLoadCommand(), newImageRemoveCommand())
	return cmd
}

func newImageListCommand() *cobra.Command {
	var out listing
	cmd := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List images", Args: cobra.NoArgs}
	out.addTo(cmd)
	return daemon{timeout: 30 * time.Second}.verb(cmd, func(ctx context.Context, c *client, cmd *cobra.Command, _ []string) error {
		answer, err := c.image.ListImages(ctx, &runtimeapi.ListImagesRequest{})
		if err != nil {
			return err
		}
		return out.print(cmd.OutOrStdout(), answer, "IMAGE SIZE PINNED ID", imageRows(answer.GetImages()))
	})
}

func imageRows(images []*runtimeapi.Image) [][]string {
	var rows [][]string
	for _, i := range images {
		names := i.GetRepoTags()
		if len(names) == 0 {
			names = i.GetRepoDigests()
		}
		if len(names) == 0 {
			names = []string{"-"}
		}
		pinned := "-"
		if i.GetPinned() {
			pinned = "yes"
		}
		for _, name := range names {
			rows = append(rows, []string{name, size(i.GetSize()), pinned, i.GetId()})
		}
	}
	slices.SortFunc(rows, func(a, b []string) int { return cmp.Compare(a[0], b[0]) })
	return rows
}

func newImagePullCommand() *cobra.Command {
	var credentials string
	cmd := &cobra.Command{
		Use:   "pull REFERENCE",
		Short: "Pull an image from its registry",
		Args:  cobra.ExactArgs(1),
	}
	cmd.Flags().StringVar(&credentials, "auth-file", "", "file with USER:PASSWORD for the registry")
	return daemon{}.verb(cmd, func(ctx context.Context, c *client, cmd *cobra.Command, args []string) error {
		auth, err := readCredentials(credentials)
		if err != nil {
			return err
		}
		id, err := c.pull(ctx, args[0], auth)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(cmd.OutOrStdout(), id)
		return err
	})
}

func (c *client) pull(ctx context.Context, reference string, auth *runtimeapi.AuthConfig) (string, error) {
	answer, err := c.image.PullImage(ctx, &runtimeapi.PullImageRequest{
		Image: &runtimeapi.ImageSpec{Image: reference},
		Auth:  auth,
	})
	if err != nil {
		return "", fmt.Errorf("pull %s: %w", reference, err)
	}
	return answer.GetImageRef(), nil
}

// readCredentials takes them from a file, for a command line can be seen by
// every process on the host.
func readCredentials(path string) (*runtimeapi.AuthConfig, error) {
	if path == "" {
		return nil, nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read credentials: %w", err)
	}
	user, password, ok := strings.Cut(strings.TrimSpace(string(text)), ":")
	if !ok {
		return nil, fmt.Errorf("read credentials: %s does not hold USER:PASSWORD", path)
	}
	return &runtimeapi.AuthConfig{Username: user, Password: password}, nil
}

func newImageLoadCommand() *cobra.Command {
	var name string
	var builtin bool
	cmd := &cobra.Command{
		Use:     "load [FILE]",
		Aliases: []string{"import"},
		Short:   "Load images from an archive, as `docker save` writes them, or an OCI layout",
		Long: `Load images from a tar archive: what "docker save" writes, or an OCI layout.
Plain or gzip. Without FILE, or with "-", the archive is read from standard input.`,
		Args: cobra.MaximumNArgs(1),
	}
	cmd.Flags().StringVar(&name, "name", "", "name of the image, if the archive does not name it")
	cmd.Flags().BoolVar(&builtin, "builtin", false, "load the small web server that this binary carries, as "+hello.Reference)
	return daemon{}.verb(cmd, func(ctx context.Context, c *client, cmd *cobra.Command, args []string) error {
		archive, err := openArchive(cmd.InOrStdin(), builtin, args)
		if err != nil {
			return err
		}
		defer archive.Close()
		images, err := admin.Load(ctx, c.cc, archive, name)
		if err != nil {
			return fmt.Errorf("load: %w", err)
		}
		for _, i := range images {
			if len(i.References) == 0 {
				i.References = []string{"-"}
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", strings.Join(i.References, " "), i.ID)
		}
		return nil
	})
}

func openArchive(stdin io.Reader, builtin bool, args []string) (io.ReadCloser, error) {
	switch {
	case builtin && len(args) > 0:
		return nil, errors.New("load: either FILE or --builtin")
	case builtin:
		return builtinArchive()
	case len(args) == 0 || args[0] == "-":
		return io.NopCloser(stdin), nil
	}
	f, err := os.Open(args[0])
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	return f, nil
}

func builtinArchive() (io.ReadCloser, error) {
	program, err := embedded.Hello()
	if err != nil {
		return nil, err
	}
	content, err := program.Bytes()
	if err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	// Ends when the archive is read or r is closed.
	go func() { w.CloseWithError(hello.WriteArchive(w, content)) }()
	return r, nil
}

func newImageRemoveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "rm REFERENCE...",
		Aliases: []string{"remove"},
		Short:   "Remove images, with all their names",
		Args:    cobra.MinimumNArgs(1),
	}
	return daemon{timeout: time.Minute}.verb(cmd, func(ctx context.Context, c *client, cmd *cobra.Command, args []string) error {
		for _, reference := range args {
			image := &runtimeapi.ImageSpec{Image: reference}
			found, err := c.image.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: image})
			if err != nil {
				return fmt.Errorf("image %s: %w", reference, err)
			}
			if found.GetImage() == nil {
				return fmt.Errorf("image %s: there is none", reference)
			}
			if _, err := c.image.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: image}); err != nil {
				return fmt.Errorf("remove image %s: %w", reference, err)
			}
		}
		return nil
	})
}
