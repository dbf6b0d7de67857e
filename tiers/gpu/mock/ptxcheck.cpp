// ptxcheck: reads PTX as the mock driver would, and says what is in it. Exits 1 if anything is refused.
#include <cstdio>
#include <fstream>
#include <sstream>

#include "ptx.h"

static void describe(const ptx::Kernel& k) {
    std::printf("  entry %s\n    parameters %zu (%u bytes), static shared %u bytes%s", k.name.c_str(), k.params.size(), k.paramBytes,
        k.sharedBytes, k.dynamicShared ? ", dynamic shared" : "");
    if (k.maxThreads) std::printf(", at most %u threads", k.maxThreads);
    if (k.minBlocks) std::printf(", at least %u blocks", k.minBlocks);
    std::printf("\n    registers:");
    for (auto& [type, n] : k.declared) std::printf(" %s %d", type.c_str(), n);
    std::map<std::string, int> classes;
    for (auto& i : k.code) {
        bool arithmetic = i.kind == ptx::Kind::alu;
        bool memory = i.kind == ptx::Kind::load || i.kind == ptx::Kind::store || i.kind == ptx::Kind::atomic;
        static const char* const spaces[] = {"generic", "global", "shared", "param", "const"};
        classes[arithmetic ? i.opcode : memory ? i.opcode + "." + spaces[int(i.space)] : ptx::kindName(i.kind)]++;
    }
    std::printf("\n    instructions %zu:", k.code.size());
    for (auto& [name, n] : classes) std::printf(" %s %d", name.c_str(), n);
    std::printf("\n");
}

int main(int argc, char** argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: ptxcheck file.ptx ...\n");
        return 2;
    }
    int bad = 0;
    for (int i = 1; i < argc; i++) {
        std::ifstream in(argv[i]);
        std::stringstream text;
        text << in.rdbuf();
        if (!in) {
            std::fprintf(stderr, "%s: cannot be read\n", argv[i]);
            return 2;
        }
        try {
            auto m = ptx::parse(text.str());
            std::printf("%s: PTX %s for %s\n", argv[i], m->version.c_str(), m->target.c_str());
            for (auto& [name, v] : m->variables)
                std::printf("  %s %s, %u bytes\n", v.space == ptx::Space::constant ? "constant" : "global", name.c_str(), v.size);
            for (auto& [name, k] : m->kernels) describe(*k);
        } catch (ptx::ParseError& e) {
            std::istringstream lines(e.what());
            for (std::string line; std::getline(lines, line);) std::fprintf(stderr, "%s: %s\n", argv[i], line.c_str());
            bad = 1;
        }
    }
    return bad;
}
