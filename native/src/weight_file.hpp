// SPDX-License-Identifier: MIT
//
// Weight file: a model file that llama.cpp has mapped into this process, found from an address in the mapping and
// opened again for direct I/O. Linux only; elsewhere nothing is found. Source: proc_pid_maps(5), open(2) O_DIRECT.
// Threading: none of its own; the pool locks.

#pragma once

#include "memory.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <sys/stat.h>
#include <vector>

namespace rotary {

class weight_file {
  public:
    // The file mapped at `address`, and the offset of that address in it. NULL, with a reason, if it is no file mapping
    // or the file has been replaced since. One object for each file while anybody holds it.
    static std::shared_ptr<weight_file> at(const void * address, uint64_t & offset, std::string & reason);

    ~weight_file();
    weight_file(const weight_file &)             = delete;
    weight_file & operator=(const weight_file &) = delete;

    const std::string & path() const { return path_; }
    int                 fd() const { return fd_; }
    uint64_t            size() const { return size_; }
    size_t              alignment() const { return alignment_; } // of offsets, lengths and memory of a direct read
    bool                is_direct() const { return is_direct_; } // false: the file system refuses O_DIRECT

    // Whether the file is still what was opened: same size and time of change. Else the reason is this thread's error.
    bool unchanged() const;

    // Read through the page cache, for the rare caller that wants a weight's bytes; false with this thread's error.
    bool copy_out(uint64_t offset, void * data, size_t size) const;

    // Tell the kernel that this process no longer wants these pages cached.
    void drop_cache() const;

  private:
    weight_file() = default;

    bool is_still(const struct stat & about) const;

    std::string path_;
    int         fd_ = -1;
    uint64_t    size_;
    timespec    changed_;
    size_t      alignment_;
    bool        is_direct_;
};

// Take the mapping around `experts` (all of one file mapping, in any order) over from the page cache: what lies between
// them becomes anonymous memory with the same content at the same addresses, which neither memory pressure nor a change
// of the file can take away; the experts' own pages become inaccessible; `others`, which somebody else pages or nobody
// reads, stay mapped. Returns the bytes copied, or -1 with this thread's error (memory ran out; what has been copied so
// far stays valid).
int64_t detach_mapping(const std::vector<memory_range> & experts, const std::vector<memory_range> & others);

// The same for a whole mapped file that holds no experts, wherever it is mapped: every file of a split model but those
// with experts. `path` is one of the files of the model. Returns as above; 0 if the model is not split.
int64_t detach_siblings(const std::string & path, const std::vector<std::string> & with_experts);

} // namespace rotary
