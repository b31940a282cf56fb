module sampan.dev/sampan/test/clients/kubelet

go 1.26.0

require (
	k8s.io/cri-api v0.37.2 // indirect
	k8s.io/cri-client v0.37.2 // indirect
)
