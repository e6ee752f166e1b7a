// SPDX-License-Identifier: MIT
//
// Prints what llama.cpp detects on this processor: one line with the features of the CPU backend that it chose, then
// the system's page size. ggml's log on stderr names the backend's file.
#include "ggml-backend.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(void) {
    ggml_backend_load_all();
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("CPU");
    if (reg == NULL) {
        fprintf(stderr, "processor: no CPU backend suits this processor\n");
        return 1;
    }
    ggml_backend_get_features_t get;
    *(void **) &get = ggml_backend_reg_get_proc_address(reg, "ggml_backend_get_features");
    for (struct ggml_backend_feature * feature = get(reg); feature->name != NULL; feature++) {
        printf(strcmp(feature->value, "1") == 0 ? "%s " : "%s=%s ", feature->name, feature->value);
    }
    printf("\n%ld\n", sysconf(_SC_PAGESIZE));
    return 0;
}
