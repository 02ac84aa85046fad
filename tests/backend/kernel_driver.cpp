// Runs one function of the CPU kernels on memory that a file describes, so that a test can run kernels that were compiled for another
// processor: built for aarch64 and linked statically, this program runs under qemu-user. test_other_machines.py writes the file.
//
//     kernel_driver FUNCTION INPUT OUTPUT
//
// INPUT holds numbers of 8 bytes, little-endian: the count of buffers, then each buffer's size and bytes; the size and bytes of the
// function's record; the count of its pointers, and for each its place in the record, the buffer, and how far into it. OUTPUT is all
// buffers after the call. The record's layout is the same on every 64-bit machine, so it comes as the Python side made it.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" {
const char* nvfp4_machine();
void nvfp4_amax(const void*);
void nvfp4_quantize(const void*);
void nvfp4_quantize_weight(const void*);
void nvfp4_expand_weight(const void*);
void nvfp4_expand_records(const uint8_t*, const uint8_t*, uint8_t*, int64_t, int32_t);
void nvfp4_data_product(const void*);
void nvfp4_weight_product(const void*);
}

struct Records { const uint8_t *codes, *scale; uint8_t* records; int64_t blocks, threads; };
static void expand_records(const void* record) {
    const Records* r = static_cast<const Records*>(record);
    nvfp4_expand_records(r->codes, r->scale, r->records, r->blocks, int32_t(r->threads));
}

struct { const char* name; void (*run)(const void*); } const FUNCTIONS[] = {
    {"nvfp4_amax", nvfp4_amax}, {"nvfp4_quantize", nvfp4_quantize}, {"nvfp4_quantize_weight", nvfp4_quantize_weight},
    {"nvfp4_expand_weight", nvfp4_expand_weight}, {"nvfp4_expand_records", expand_records},
    {"nvfp4_data_product", nvfp4_data_product}, {"nvfp4_weight_product", nvfp4_weight_product},
};

static void fail(const char* what) { std::fprintf(stderr, "kernel_driver: %s\n", what); std::exit(1); }
static void read(std::FILE* file, void* to, size_t size) { if (std::fread(to, 1, size, file) != size) fail("the input ends early"); }
static int64_t number(std::FILE* file) { int64_t n; read(file, &n, 8); return n; }

int main(int count, char** words) {
    if (count == 2 && !std::strcmp(words[1], "machine")) { std::puts(nvfp4_machine()); return 0; }
    if (count != 4) fail("usage: kernel_driver FUNCTION INPUT OUTPUT, or kernel_driver machine");
    std::FILE* in = std::fopen(words[2], "rb");
    if (!in) fail("no input");
    std::vector<std::vector<uint8_t>> buffers(static_cast<size_t>(number(in)));
    for (auto& buffer : buffers) { buffer.resize(size_t(number(in))); read(in, buffer.data(), buffer.size()); }
    std::vector<uint8_t> record(static_cast<size_t>(number(in)));
    read(in, record.data(), record.size());
    for (int64_t pointers = number(in); pointers > 0; --pointers) {
        const int64_t place = number(in), buffer = number(in), offset = number(in);
        const uint8_t* pointer = buffers[size_t(buffer)].data() + offset;
        std::memcpy(record.data() + place, &pointer, 8);
    }
    std::fclose(in);
    bool found = false;
    for (const auto& function : FUNCTIONS) if (!std::strcmp(function.name, words[1])) { function.run(record.data()); found = true; }
    if (!found) fail("no such function");
    std::FILE* out = std::fopen(words[3], "wb");
    if (!out) fail("the output cannot be written");
    for (const auto& buffer : buffers) if (std::fwrite(buffer.data(), 1, buffer.size(), out) != buffer.size()) fail("the disk is full");
    return std::fclose(out);
}
