// Host interface of the question whether this build runs on a device: plain C.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// Returns 0 where kernels can be launched on the current device, else a cudaError_t. Launches nothing.
int sdgp_check_device(void);

#ifdef __cplusplus
}
#endif
