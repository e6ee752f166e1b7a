// SPDX-License-Identifier: MIT
//
// Trial: does the llama.cpp in this process run on this processor? See cpu_trial.cpp.
// Threading: any thread.

#pragma once

namespace rotary {

// False only if a small graph, computed in a forked child, dies of an illegal instruction.
bool cpu_runs();

} // namespace rotary
