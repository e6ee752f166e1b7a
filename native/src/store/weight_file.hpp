// SPDX-License-Identifier: MIT
//
// Weight file: a model file that llama.cpp has mapped into this process, found from an address in the mapping and
// opened again for direct I/O. Linux only; elsewhere nothing is found. Source: proc_pid_maps(5), open(2) O_DIRECT.
// Threading: none of its own; the pool locks.

#pragma once

#include "base/memory.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
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
    bool                in_memory() const { return in_memory_; } // on a tmpfs: there is no disk to read it from

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
    bool        in_memory_;
};

// Takes mappings over from the page cache: what lies between experts becomes anonymous memory with the same content at
// the same addresses, which neither memory pressure nor a change of the file can take away, and the experts' own pages
// become inaccessible. In two steps, as memory may run out: what is added is only copied, and nothing has changed until
// commit(). Copies that were not committed are given back.
class mapping_takeover {
  public:
    mapping_takeover() = default;
    ~mapping_takeover();
    mapping_takeover(const mapping_takeover &)             = delete;
    mapping_takeover & operator=(const mapping_takeover &) = delete;

    // The mapping around `experts`, all of one file mapping, in any order. `others`, which somebody else pages or nobody
    // reads, stay mapped. False with this thread's error.
    bool add(const std::vector<memory_range> & experts, const std::vector<memory_range> & others);

    // The other files of the split models that `paths` are of, wherever they are mapped, but those `with_experts`.
    bool add_siblings(const std::set<std::string> & paths, const std::set<std::string> & with_experts);

    // Put the copies in place, then shut the experts' pages. False with this thread's error: then these pages are as they
    // were, and what has been put in place stays valid.
    bool commit();

    uint64_t bytes() const { return bytes_; } // copied

  private:
    struct copy {
        char * memory;
        char * at;
        size_t size;
    };
    bool add_copy(const std::string & path, char * begin, char * end);

    std::vector<copy>         copies_;
    std::vector<memory_range> shut_;      // experts
    std::vector<memory_range> forgotten_; // out of memory until they are read again
    uint64_t                  bytes_ = 0;
};

} // namespace rotary
