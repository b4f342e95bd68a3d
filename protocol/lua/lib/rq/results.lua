--- @include lib/basics/stamps

-- One entry of RQ's result stream. kind: 1 finished, 2 failed (rq.results.Result.Type).
local function add_result(id, kind, worker, execution, started, field, value)
  local entry = { 'type', kind, 'worker_name', worker }
  if value ~= '' then
    entry[#entry + 1] = field
    entry[#entry + 1] = value
  end
  if execution ~= '' then
    for _, item in ipairs({ 'execution_id', execution, 'execution_started_at', started or timestamp(),
      'execution_ended_at', timestamp() }) do
      entry[#entry + 1] = item
    end
  end
  redis.call('XADD', KEY.results .. id, 'MAXLEN', 10, '*', unpack(entry))
end
