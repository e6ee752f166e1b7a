// SPDX-License-Identifier: MIT
//
// Weight file: a model file that llama.cpp has mapped into this process, found by an address in the mapping and opened
// again for direct I/O. Linux only. Source: proc_pid_maps(5), open(2) O_DIRECT.
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
    // The file mapped at `address`, and the offset of that address in it. NULL with a reason if no file is mapped there
    // or the file has been replaced since. Callers share one object per file.
    static std::shared_ptr<weight_file> at(const void * address, uint64_t & offset, std::string & reason);

    ~weight_file();
    weight_file(const weight_file &)             = delete;
    weight_file & operator=(const weight_file &) = delete;

    const std::string & path() const { return path_; }
    int                 fd() const { return fd_; }
    uint64_t            size() const { return size_; }
    size_t              alignment() const { return alignment_; } // of offsets, lengths and memory of a direct read
    bool                is_direct() const { return is_direct_; } // false: the file system refuses direct reads
    bool                in_memory() const { return in_memory_; } // on tmpfs or ramfs: there is no disk to read from

    // Whether size and modification time are those of the file that was opened; false with this thread's error.
    bool unchanged() const;

    // Read through the page cache; false with this thread's error.
    bool copy_out(uint64_t offset, void * data, size_t size) const;

    // Ask the kernel to drop the file from the page cache.
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

// Replaces mappings of files: dense weights become anonymous memory with the same content at the same addresses, which
// neither memory pressure nor a change of the file can take away, and the experts' pages become inaccessible. As memory
// may run out, add() only copies, and commit() changes the mappings. The destructor frees what was not committed.
class mapping_takeover {
  public:
    mapping_takeover() = default;
    ~mapping_takeover();
    mapping_takeover(const mapping_takeover &)             = delete;
    mapping_takeover & operator=(const mapping_takeover &) = delete;

    // Copy all of the file mapping that holds `experts` except these and `others`: experts of other pools and weights
    // that nobody reads, which stay mapped. Both in any order. False with this thread's error.
    bool add(const std::vector<memory_range> & experts, const std::vector<memory_range> & others);

    // If `paths` are shards of split models: copy the mappings of all other shards, except those `with_experts`.
    bool add_siblings(const std::set<std::string> & paths, const std::set<std::string> & with_experts);

    // Put the copies in place, then make the experts' pages inaccessible. False with this thread's error: the experts'
    // pages are unchanged, and copies that are in place stay valid.
    bool commit();

    uint64_t bytes() const { return bytes_; } // copied so far

  private:
    struct copy {
        char * memory;
        char * at;
        size_t size;
    };
    bool add_copy(const std::string & path, char * begin, char * end);

    std::vector<copy>         copies_;
    std::vector<memory_range> shut_;      // experts, to become inaccessible
    std::vector<memory_range> forgotten_; // others, dropped from memory until they are read again
    uint64_t                  bytes_ = 0;
};

} // namespace rotary
