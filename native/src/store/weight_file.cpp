// SPDX-License-Identifier: MIT
//
// Weight file. See weight_file.hpp.

#include "store/weight_file.hpp"

#include "base/error.hpp"
#include "base/fork.hpp"
#include "rotary.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <linux/magic.h>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

namespace rotary {

// ---- mappings of this process

struct mapping {
    memory_range range;
    uint64_t     offset;
    unsigned     major, minor;
    uint64_t     inode;
    std::string  path;
};

// The mappings of files that `wanted` accepts.
template <typename predicate> static std::vector<mapping> mappings(const predicate & wanted) {
    std::vector<mapping> found;
    std::ifstream        maps("/proc/self/maps");
    std::string          line;
    line.reserve(4096); // getline() takes a failed allocation for the end of the file
    while (std::getline(maps, line)) {
        uint64_t begin, end;
        int      path = 0;
        mapping  next;
        if (sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %*s %" SCNx64 " %x:%x %" SCNu64 " %n", &begin, &end,
                   &next.offset, &next.major, &next.minor, &next.inode, &path) < 6) {
            continue;
        }
        next.range = { (char *) begin, (char *) end };
        next.path  = path > 0 ? line.substr(path) : "";
        if (next.inode != 0 && !next.path.empty() && next.path[0] == '/' && wanted(next)) {
            found.push_back(next);
        }
    }
    return found;
}

static bool mapping_at(const char * address, mapping & found) {
    const auto here =
        mappings([&](const mapping & each) { return address >= each.range.begin && address < each.range.end; });
    if (!here.empty()) {
        found = here[0];
    }
    return !here.empty();
}

// ---- file

static auto & files_mutex = *new fork_mutex;
// By device and inode. Never destroyed: models may outlive static objects.
static auto & files = *new std::map<std::pair<uint64_t, uint64_t>, std::weak_ptr<weight_file>>;

// The alignment that the file system asks of direct reads. Kernels before 6.1 do not report it; 4 KiB always do.
static size_t direct_alignment(int fd) {
#ifdef STATX_DIOALIGN
    struct statx about;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &about) == 0 && (about.stx_mask & STATX_DIOALIGN) != 0 &&
        about.stx_dio_offset_align != 0) {
        return std::max<size_t>({ 512, about.stx_dio_offset_align, about.stx_dio_mem_align });
    }
#else
    (void) fd;
#endif
    return 4096;
}

// Some file systems accept O_DIRECT when a file is opened and then refuse each direct read.
static bool reads_directly(int fd) {
    const size_t page   = sysconf(_SC_PAGESIZE);
    void *       memory = nullptr;
    if (posix_memalign(&memory, page, page) != 0) {
        return true;
    }
    const iovec   whole   = { memory, page };
    const ssize_t n       = preadv(fd, &whole, 1, 0);
    const bool    refuses = n < 0 && (errno == EINVAL || errno == EOPNOTSUPP);
    free(memory);
    return !refuses;
}

static bool lies_in_memory(int fd) {
    struct statfs system;
    return fstatfs(fd, &system) == 0 && (system.f_type == TMPFS_MAGIC || (uint32_t) system.f_type == RAMFS_MAGIC);
}

std::shared_ptr<weight_file> weight_file::at(const void * address, uint64_t & offset, std::string & reason) {
    mapping here;
    if (!mapping_at((const char *) address, here)) {
        reason = "they lie in no mapped file";
        return nullptr;
    }
    offset = here.offset + ((const char *) address - here.range.begin);

    const std::lock_guard<std::mutex> lock(files_mutex);
    std::weak_ptr<weight_file> &      known = files[{ makedev(here.major, here.minor), here.inode }];
    struct stat                       about;
    if (std::shared_ptr<weight_file> opened = known.lock()) {
        if (fstat(opened->fd_, &about) == 0 && opened->is_still(about)) {
            return opened; // else the file was rewritten since `opened` was loaded
        }
    }
    std::shared_ptr<weight_file> file(new weight_file);
    file->path_      = here.path;
    file->is_direct_ = true;
    file->fd_        = open(here.path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (file->fd_ < 0 ? errno == EINVAL : !reads_directly(file->fd_)) {
        if (file->fd_ >= 0) {
            close(file->fd_);
        }
        file->is_direct_ = false; // tmpfs before Linux 6.6, some network file systems
        file->fd_        = open(here.path.c_str(), O_RDONLY | O_CLOEXEC);
    }
    if (file->fd_ < 0 || fstat(file->fd_, &about) != 0) {
        reason = format("%s cannot be opened again, %s", here.path.c_str(), strerror(errno));
        return nullptr;
    }
    // The path may name another file by now. Compare inodes only: some file systems report different device numbers in
    // /proc/self/maps and in stat().
    if (about.st_ino != here.inode) {
        reason = format("%s is another file by now than the one that was loaded", here.path.c_str());
        return nullptr;
    }
    file->in_memory_ = lies_in_memory(file->fd_);
    file->size_      = about.st_size;
    file->changed_   = about.st_mtim;
    file->alignment_ = file->is_direct_ ? direct_alignment(file->fd_) : 1;
    known            = file;
    return file;
}

weight_file::~weight_file() {
    if (fd_ >= 0) {
        close(fd_);
    }
}

bool weight_file::copy_out(uint64_t offset, void * data, size_t size) const {
    const int fd = open(format("/proc/self/fd/%d", fd_).c_str(), O_RDONLY | O_CLOEXEC); // the same file, renamed or not
    ssize_t   n  = fd < 0 ? -1 : 1;
    size_t    done = 0;
    while (n > 0 && done < size) {
        n = pread(fd, (char *) data + done, size - done, offset + done);
        done += n > 0 ? n : 0;
    }
    if (n <= 0) {
        fail(ROTARY_ERR_READ, format("%s: reading %zu bytes at %" PRIu64 " failed, %s; load the model again",
                                     path_.c_str(), size, offset, n == 0 ? "the file ends" : strerror(errno)));
    }
    if (fd >= 0) {
        close(fd);
    }
    return n > 0;
}

bool weight_file::is_still(const struct stat & about) const {
    return (uint64_t) about.st_size == size_ && about.st_mtim.tv_sec == changed_.tv_sec &&
           about.st_mtim.tv_nsec == changed_.tv_nsec;
}

bool weight_file::unchanged() const {
    struct stat about;
    if (fstat(fd_, &about) != 0) {
        fail(ROTARY_ERR_READ, format("%s: %s; load the model again", path_.c_str(), strerror(errno)));
        return false;
    }
    if (!is_still(about)) {
        fail(ROTARY_ERR_READ, format("%s: was changed while in use (%" PRIu64 " bytes when loaded, %" PRIu64
                                     " now); its experts can no longer be read; load the model again",
                                     path_.c_str(), size_, (uint64_t) about.st_size));
        return false;
    }
    return true;
}

void weight_file::drop_cache() const {
    posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED);
}

// ---- takeover

mapping_takeover::~mapping_takeover() {
    for (const copy & each : copies_) {
        munmap(each.memory, each.size);
    }
}

static bool no_room(const std::string & path, size_t bytes) {
    fail(ROTARY_ERR_MEMORY, format("%s: no memory for %s of weights that are not experts; close other programs",
                                   path.c_str(), mib(bytes).c_str()));
    return false;
}

// Copy the whole pages [begin, end).
bool mapping_takeover::add_copy(const std::string & path, char * begin, char * end) {
    static constexpr ptrdiff_t step = 64 << 20;
    for (char * at = begin; at < end; at += step) {
        const size_t size = std::min(step, end - at);
        copies_.reserve(copies_.size() + 1); // so that push_back() cannot fail and leak the mapping
        void * memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            return no_room(path, end - begin);
        }
        copies_.push_back({ (char *) memory, at, size });
        memcpy(memory, at, size);
    }
    bytes_ += end - begin;
    return true;
}

bool mapping_takeover::add(const std::vector<memory_range> & experts, const std::vector<memory_range> & others) {
    const uintptr_t page       = sysconf(_SC_PAGESIZE);
    const auto      first_page = [&](const memory_range & range) {
        return (char *) (((uintptr_t) range.begin + page - 1) / page * page);
    };
    // Look for an expert that is still mapped, by its first whole page: another pool may have copied the page before,
    // which dense weights share.
    mapping first;
    if (std::none_of(experts.begin(), experts.end(), [&](const memory_range & each) {
            return first_page(each) < each.end && mapping_at(first_page(each), first);
        })) {
        return true;
    }
    // What is left of its mapping: other pools may have replaced parts, and llama.cpp has unmapped weights at the
    // file's ends that it copied, where other memory may lie by now.
    const auto base_of = [](const mapping & each) {
        return (uintptr_t) each.range.begin - each.offset;
    };
    const auto left = mappings([&](const mapping & each) {
        return each.inode == first.inode && each.major == first.major && each.minor == first.minor &&
               base_of(each) == base_of(first);
    });
    const auto clip = [&](const memory_range & range, const mapping & within) {
        // Pages that an expert shares with other weights are copied.
        const auto end = (char *) ((uintptr_t) range.end / page * page);
        return memory_range{ std::max(first_page(range), within.range.begin), std::min(end, within.range.end) };
    };
    for (const mapping & part : left) {
        std::vector<memory_range> stays;
        for (const auto & [ranges, noted] :
             { std::make_pair(&experts, &shut_), std::make_pair(&others, &forgotten_) }) {
            for (const memory_range & each : *ranges) {
                const memory_range inside = clip(each, part);
                if (inside.begin < inside.end) {
                    noted->push_back(inside);
                    stays.push_back(inside);
                }
            }
        }
        std::sort(stays.begin(), stays.end(), [](const auto & a, const auto & b) { return a.begin < b.begin; });
        stays.push_back({ part.range.end, part.range.end });
        char * kept = part.range.begin; // begin of the part before the next range of `stays`
        for (const memory_range & each : stays) {
            if (each.begin > kept && !add_copy(part.path, kept, each.begin)) {
                return false;
            }
            kept = std::max(kept, each.end);
        }
    }
    return true;
}

// "model-00002-of-00003.gguf" -> "model"; false if it is no such name
static bool shard_prefix(const std::string & path, std::string & prefix) {
    static const std::string pattern = "-00000-of-00000.gguf";
    if (path.size() <= pattern.size()) {
        return false;
    }
    const size_t at = path.size() - pattern.size();
    for (size_t i = 0; i < pattern.size(); i++) {
        const char c = path[at + i];
        if (pattern[i] == '0' ? !isdigit((unsigned char) c) : c != pattern[i]) {
            return false;
        }
    }
    prefix = path.substr(0, at);
    return true;
}

bool mapping_takeover::add_siblings(const std::set<std::string> & paths, const std::set<std::string> & with_experts) {
    std::set<std::string> prefixes;
    std::string           prefix;
    for (const std::string & path : paths) {
        if (shard_prefix(path, prefix)) {
            prefixes.insert(prefix);
        }
    }
    const auto siblings = mappings([&](const mapping & each) {
        return shard_prefix(each.path, prefix) && prefixes.count(prefix) != 0 && with_experts.count(each.path) == 0;
    });
    return std::all_of(siblings.begin(), siblings.end(),
                       [&](const mapping & each) { return add_copy(each.path, each.range.begin, each.range.end); });
}

// mremap replaces a mapping atomically: a thread that reads there meanwhile sees the old page or the copy.
bool mapping_takeover::commit() {
    while (!copies_.empty()) {
        const copy & last = copies_.back();
        if (mremap(last.memory, last.size, last.size, MREMAP_MAYMOVE | MREMAP_FIXED, last.at) == MAP_FAILED) {
            fail(ROTARY_ERR_MEMORY, format("memory: %s cannot take the place of a mapping, %s; raise vm.max_map_count",
                                           mib(last.size).c_str(), strerror(errno)));
            return false;
        }
        copies_.pop_back();
    }
    for (const memory_range & each : forgotten_) {
        madvise(each.begin, each.end - each.begin, MADV_DONTNEED);
    }
    for (const memory_range & each : shut_) {
        // If this fails, the pages stay mapped, which does no harm: nobody reads them.
        mmap(each.begin, each.end - each.begin, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
             0);
    }
    return true;
}

} // namespace rotary
